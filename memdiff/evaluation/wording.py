"""What a page says about its run besides the answer: sentences that its numbers support.

Parts of the report that are missing leave out their sentence and no more.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from memdiff.evaluation.answer import CRITERIA, verdict
from memdiff.evaluation.lookup import description_of, made_data, mean_of, num_seeds, row_of
from memdiff.evaluation.numerals import (
  bounds,
  count,
  is_number,
  listed,
  number,
  percent,
  place,
  points,
  share,
  share_bounds,
  to,
)

_MAX_NAMES = 5


def comparison(report: Mapping[str, Any]) -> list[str]:
  """The generator that was looked at against the best head on real data only, in sentences."""
  sentences = (_gain_sentence(report), _headroom_sentence(report), _groups_sentence(report))
  return [sentence for sentence in sentences if sentence]


def _gain_sentence(report: Mapping[str, Any]) -> str:
  compared = report.get("comparison") or {}
  gain = compared.get("gain") or {}
  if not is_number(gain.get("mean")):
    return ""
  finding = {
    "better": f"{made_data(report)} help",
    "worse": f"clearly worse with {made_data(report)}",
    "unclear": "no clear difference",
  }[verdict(gain)]
  described = description_of(report, compared["control"])
  control = f"{compared['control']} ({described})" if described else compared["control"]
  return f"{compared['method']} is {place(gain['mean'])} {control}: {finding}{bounds(gain)}."


def _headroom_sentence(report: Mapping[str, Any]) -> str:
  compared = report.get("comparison") or {}
  headroom = compared.get("headroom") or {}
  if not is_number(headroom.get("mean")):
    return ""
  finding = (
    f"{compared['reference']} is {place(headroom['mean'])} {compared['control']}{bounds(headroom)}"
  )
  if verdict(headroom) != "better":
    return (
      f"{finding}: even additional real examples bring no clear gain, so synthetic ones have no"
      " room to help."
    )
  closed = compared.get("gap_closed") or {}
  limits = f" (95 % interval {share_bounds(closed)})" if share_bounds(closed) else ""
  fills = f" {compared['method']} fills {share(closed)} % of it{limits}." if closed else ""
  return f"{finding}: {made_data(report)} could gain at most this much.{fills}"


def _groups_sentence(report: Mapping[str, Any]) -> str:
  compared = report.get("comparison") or {}
  method, control = (row_of(report, compared.get(key)) for key in ("method", "control"))
  parts = []
  for key in ("few", "medium", "many"):
    ours, theirs = mean_of(method, key), mean_of(control, key)
    if ours is not None and theirs is not None:
      parts.append(f"{percent(ours)} % against {percent(theirs)} % on {key}")
  if not parts:
    return ""
  return f"By group, {compared['method']} against {compared['control']}: {listed(parts)}."


def decision(report: Mapping[str, Any]) -> list[str]:
  """How cross-validation on training data came to its recommendation; none if it was not run."""
  advice = report.get("recommendation")
  if not advice:
    return []
  difference = (
    f"{points(advice['expected_gain'])} points against {advice['control']}, 95 % interval"
    f" {to(advice['interval'])}"
  )
  if advice["method"] == advice["best"] != advice["control"]:
    first = f"{advice['best']} is better than the best without synthetic data: {difference}."
  elif advice["best"] == advice["control"]:
    first = f"{advice['control']} scores highest, with or without synthetic data."
  else:
    first = (
      f"{advice['best']} scores highest, but is not clearly better than the best without synthetic"
      f" data ({difference}). A generator without a clear gain is not recommended."
    )
  basis = _basis_sentence(advice["basis"], advice.get("criterion") or report.get("criterion"))
  sentences = [basis, first]
  if advice.get("agreement"):
    sentences.append(_agreement_sentence(advice))
  return sentences


def _basis_sentence(basis: Mapping[str, Any], criterion: str | None) -> str:
  encoders = {
    "retrained": "with a separate encoder for each fold, which never saw the held-out examples",
    "frozen": "on the features as they are. If the encoder was trained on these examples, it may"
    " have memorised them, and these scores are then misleading",
  }
  repeats = f", {basis['repeats']} times" if basis["repeats"] > 1 else ""
  name = CRITERIA.get(criterion, CRITERIA["balanced_accuracy"])[0]
  return (
    f"Decided on training data alone, by {name} in {basis['folds']}-fold cross-validation{repeats},"
    f" {encoders[basis['encoder']]}."
  )


def _agreement_sentence(advice: Mapping[str, Any]) -> str:
  agreement = advice["agreement"]
  beaten = agreement["regret_of_recommended"]
  best = (
    f"the best of {agreement['methods']} methods is {percent(beaten)} points above the recommended"
    " one"
    if float(percent(beaten)) > 0
    else f"the recommended one is the best of {agreement['methods']} methods"
  )
  gain = ""
  if advice["best"] != advice["control"]:
    change = points(agreement["test_gain"]["mean"])
    gain = f" {advice['best']} differs from {advice['control']} by {change} points."
  return (
    f"Checked on the test set afterwards:{gain} {100 * agreement['pairs']:.0f} % of the pairs of"
    f" methods rank in the same order (Kendall's tau {number(agreement['kendall_tau'], 2)}), and"
    f" {best}."
  )


def calibration(known: Mapping[str, Any]) -> str:
  """How far the probabilities of a method can be believed; `known` is of its row."""
  error, before = (percent(known[name]["mean"]) for name in ("error", "error_before"))
  found = f"their expected calibration error on the test set is {error} %"
  if known["temperature"] is None:
    return f"Its probabilities are not calibrated, since nothing was held out; {found}."
  if known["temperature"] == 1:
    return (
      f"Its probabilities stay as they are, since held-out examples ask for no change; {found}."
    )
  return (
    "Its probabilities are calibrated by held-out examples (temperature"
    f" {number(known['temperature'], 2)}); {found}, without that {before} %."
  )


def usage(report: Mapping[str, Any], method: str | None) -> str:
  """What a reader can expect of the method's probabilities; empty if the report does not say."""
  known = row_of(report, method).get("calibration")
  return f"Without --method, {method} predicts. {calibration(known)}" if known else ""


def untested(report: Mapping[str, Any]) -> str:
  """Names the classes that no average can count."""
  names = (report.get("dataset") or {}).get("classes_without_test_rows") or []
  if not names:
    return ""
  more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
  shown = ", ".join(names[:_MAX_NAMES])
  verb = "has" if len(names) == 1 else "have"
  return (
    f"{count(len(names), 'class', 'classes')} {verb} no test examples and"
    f" {'is' if len(names) == 1 else 'are'} left out of averages over classes: {shown}{more}."
  )


def preamble(report: Mapping[str, Any]) -> list[str]:
  """The lines above the text table: the data set, the seeds, the groups' rule."""
  dataset = report.get("dataset") or {}
  parts = [f"test accuracy in % on {dataset.get('name', 'the test set')}"]
  counts = dataset.get("train_counts") or []
  if counts:
    parts.append(f"{count(len(counts), 'class', 'classes')}")
    parts.append(f"{max(counts):,} to {min(counts):,} training examples per class")
  seeds = num_seeds(report)
  if seeds:
    parts.append("1 seed, so no spread" if seeds == 1 else f"mean ± std over {seeds} seeds")
  groups = [
    f"{group['name']} = {group['rule']} ({count(len(group['classes']), 'class', 'classes')})"
    for group in report.get("groups") or []
  ]
  lines = [", ".join(parts), "; ".join(groups), untested(report)]
  return [line for line in lines if line]


def summary(report: Mapping[str, Any]) -> str:
  """One paragraph for a reader who knows nothing about the method."""
  dataset = report.get("dataset") or {}
  counts = dataset.get("train_counts") or []
  synthetic = [n for n in report.get("synthetic_counts") or [] if n]
  text = []
  if counts:
    imbalance = dataset.get("imbalance")
    factor = f" (imbalance factor {imbalance:g})" if is_number(imbalance) else ""
    text.append(
      f"The data set {dataset.get('name', '')} has {count(len(counts), 'class', 'classes')}, and "
      f"they are not equally common: the largest one has {count(max(counts), 'training example')},"
      f" the smallest {min(counts):,}{factor}. A classifier trained on such a long tail learns the"
      " common classes well and neglects the rare ones."
    )
  if synthetic and report.get("synthetic_kind") == "images":
    text.append(
      f"memdiff drew {count(sum(synthetic), 'image')} for "
      f"{_helped_classes(counts, report['synthetic_counts'])} by a diffusion model of the training "
      "images, and trained classifiers on real and generated images together. This page shows "
      "whether that helped."
    )
  elif synthetic:
    text.append(
      f"memdiff generated {count(sum(synthetic), 'synthetic example')} for "
      f"{_helped_classes(counts, report['synthetic_counts'])}. They are features, not pictures: "
      "lists of numbers that the classifier uses to describe what it sees. memdiff then retrained "
      "the classifier’s last layer with them. This page shows whether that helped."
    )
  seeds, tested = num_seeds(report), dataset.get("test_count")
  if seeds:
    times = "once" if seeds == 1 else f"{seeds} times with different random seeds"
    text.append(f"Every method was trained {times}.")
    if tested:
      text.append(f"It was tested on {tested:,} examples that were not used for training.")
  return " ".join(text)


def _helped_classes(counts: Sequence[int], synthetic: Sequence[int]) -> str:
  """Which classes got synthetic features, in words that the counts bear out."""
  helped = [n for n, added in zip(counts, synthetic, strict=False) if added]
  others = [n for n, added in zip(counts, synthetic, strict=False) if not added]
  number = sum(1 for added in synthetic if added)
  if helped and others and max(helped) <= min(others):
    return f"the {number} rarest classes" if number > 1 else "the rarest class"
  return count(number, "class", "classes")


def steps(report: Mapping[str, Any]) -> list[tuple[str, str]]:
  dataset = report.get("dataset") or {}
  counts = dataset.get("train_counts") or []
  synthetic = [n for n in report.get("synthetic_counts") or [] if n]
  if not counts or not synthetic:
    return []
  if report.get("synthetic_kind") == "images":
    return [
      ("Learn", f"A diffusion model learns {sum(counts):,} images of {len(counts):,} classes."),
      ("Draw", "It turns noise into new images of the classes that lack some."),
      ("Filter", "Classifiers of the real images look at each new one; filters keep those that show"
       " their class."),
      ("Train", f"A classifier is trained on real images and on {sum(synthetic):,} new ones."),
      ("Check", "Folds of the training images, which neither generator nor classifier has seen, say"
       " beforehand whether it is worth it."),
    ]  # fmt: skip
  return [
    ("Encode", f"A network learns from {sum(counts):,} examples to turn each into a feature, a "
     "list of numbers that describes it."),
    ("Remember", f"A memory bank keeps, for each of {len(counts):,} classes, the mean feature and a"
     " sample of individual features."),
    ("Hallucinate", "A diffusion model looks at a class’s memory and turns noise into new features:"
     f" {sum(synthetic):,} of them."),
    ("Weigh", "Each new feature gets a confidence: how well it fits its class."),
    ("Retrain", "The last layer is retrained on real and new features. New features with low"
     " confidence count less."),
  ]  # fmt: skip
