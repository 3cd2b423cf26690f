"""Feature quality of one run: every metric over seeds and classes, with what it means in words."""

import numpy as np
from scipy.spatial.distance import cdist

from memdiff.evaluation import features as metrics
from memdiff.evaluation.classification import mean_std, plain

# name -> (meaning, which direction is good)
_WORDS = {
  "diversity": (
    "Mean distance between hallucinated features of a class, over that between unseen real ones.",
    "close to 1",
  ),
  "kl_gaussian": (
    "KL(unseen real || hallucinated) in nats of two Gaussians with Ledoit-Wolf covariances.",
    "close to 0",
  ),
  "mmd": (
    "Squared kernel distance (unbiased, median bandwidth) of hallucinated to training features.",
    "close to 0",
  ),
  "separation": (
    "Mean cosine of hallucinated features within a class minus that to other classes.",
    "close to that of unseen real features",
  ),
  "memorization_ratio": (
    "Distance of hallucinated features to the nearest training one, over that of unseen real ones.",
    "close to 1; 0 means copies",
  ),
  "truth_mmd": (
    "Squared kernel distance between hallucinated and unseen real features.",
    "close to 0",
  ),
  "truth_frechet": (
    "Frechet distance between hallucinated and unseen real features.",
    "close to 0",
  ),
  "truth_precision": (
    "Share of hallucinated features that lie among unseen real ones.",
    "close to 1",
  ),
  "truth_recall": (
    "Share of unseen real features that lie among hallucinated ones.",
    "close to 1",
  ),
}


def _class_values(train, left_out, synthetic) -> tuple[dict, dict, float]:
  """Metrics of one class and seed, the same for a reference, and the KL's shrinkage.

  The reference says what real data reach: of the training exemplars where there are two or more.
  """
  kl, shrinkage = metrics.gaussian_kl(left_out, synthetic)
  precision, recall = metrics.precision_recall(left_out, synthetic)
  real_diversity = metrics.diversity(left_out)
  values = {
    "diversity": metrics.diversity(synthetic) / real_diversity,
    "kl_gaussian": kl,
    "mmd": metrics.mmd(train, synthetic),
    "memorization_ratio": metrics.memorization_ratio(train, left_out, synthetic),
    "truth_mmd": metrics.mmd(left_out, synthetic),
    "truth_frechet": metrics.frechet(left_out, synthetic),
    "truth_precision": precision,
    "truth_recall": recall,
  }
  precision, recall = metrics.precision_recall(left_out, train)
  reference = {
    "diversity": metrics.diversity(train) / real_diversity,
    "mmd": metrics.mmd(train, left_out),
    "truth_mmd": metrics.mmd(left_out, train),
    "truth_frechet": metrics.frechet(left_out, train),
    "truth_precision": precision,
    "truth_recall": recall,
  }
  return values, reference, shrinkage


_REFERENCE_WORDS = {
  "separation": "unseen real features",
  "mmd": "unseen real features against training features",
}


def measure(
  train: np.ndarray,
  train_labels: np.ndarray,
  left_out: np.ndarray,
  left_out_labels: np.ndarray,
  synthetic: np.ndarray,
  synthetic_labels: np.ndarray,
  num_classes: int,
) -> dict:
  """All quality metrics of a run.

  Args:
    train, left_out, synthetic: [S, n, D] standardised features.
    train_labels, left_out_labels, synthetic_labels: [n].
    num_classes: C.

  Returns:
    {metric: {mean, std, per_class [C], meaning, better, reference}}, mean and std over seeds of
    the mean over hallucinated classes; `truth_test` holds those against left-out features; a class
    without enough features is None. `kl_gaussian` has `shrinkage`, the largest intensity used.
  """
  num_seeds = len(train)
  classes = np.unique(synthetic_labels)
  names = [name for name in _WORDS if name != "separation"]
  shape = (num_seeds, num_classes)
  values = {name: np.full(shape, np.nan) for name in _WORDS}
  references = {name: np.full(shape, np.nan) for name in _WORDS}
  shrinkages = []
  for seed in range(num_seeds):
    for label in classes:
      value, reference, shrinkage = _class_values(
        train[seed][train_labels == label],
        left_out[seed][left_out_labels == label],
        synthetic[seed][synthetic_labels == label],
      )
      shrinkages.append(shrinkage)
      for name in names:
        values[name][seed, label] = value[name]
        references[name][seed, label] = reference.get(name, np.nan)
    centre = train[seed].mean(axis=0)
    values["separation"][seed] = metrics.separation(
      synthetic[seed], synthetic_labels, centre, num_classes
    )
    among = np.isin(left_out_labels, classes)
    references["separation"][seed] = metrics.separation(
      left_out[seed][among], left_out_labels[among], centre, num_classes
    )
  report, truth = {}, {}
  for name, (meaning, better) in _WORDS.items():
    entry = _over_classes(values[name]) | {"meaning": meaning, "better": better}
    reference = _over_classes(references[name])
    if reference["mean"] is not None:
      label = _REFERENCE_WORDS.get(name, "training features in their place")
      entry["reference"] = {"label": label, "mean": reference["mean"], "std": reference["std"]}
    if name.startswith("truth_"):
      truth[name.removeprefix("truth_")] = entry
    else:
      report[name] = entry
  finite = [s for s in shrinkages if np.isfinite(s)]
  report["kl_gaussian"]["shrinkage"] = max(finite) if finite else None
  return report | {"truth_test": truth}


def _over_classes(values: np.ndarray) -> dict:
  """[S, C] with NaN where there is nothing -> mean and std over seeds of the mean over classes."""
  present = np.isfinite(values).all(axis=0)
  if not present.any():
    return {"mean": None, "std": None, "per_class": [None] * values.shape[1]}
  over_seeds = np.where(present, values, 0.0).mean(axis=0)
  per_class = plain(np.where(present, over_seeds, np.nan))
  return mean_std(values[:, present].mean(axis=1)) | {"per_class": per_class}


def nearness(
  synthetic: np.ndarray, labels: np.ndarray, left_out: np.ndarray, left_out_labels: np.ndarray
) -> np.ndarray:
  """Distance of each synthetic feature to the nearest unseen real one of its class, in units.

  The unit is the class's median distance of an unseen feature to its nearest neighbour among them:
  1 is as near as real ones are to each other. [M]; NaN where a class has fewer than two unseen.
  """
  distances = np.full(len(labels), np.nan)
  for label in np.unique(labels):
    unseen, own = left_out[left_out_labels == label], labels == label
    if len(unseen) < 2:
      continue
    between = cdist(unseen, unseen) + np.diag(np.full(len(unseen), np.inf))
    unit = np.median(between.min(axis=1))
    if unit > 0:
      distances[own] = cdist(synthetic[own], unseen).min(axis=1) / unit
  return distances
