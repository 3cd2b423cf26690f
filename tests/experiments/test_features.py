"""The experiment on features: a run on embeddings, the references, and settings that do not fit."""

import dataclasses
import io
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from configs import digits_lt
from configs import features as features_config
from input_pipeline import embeddings
from memdiff import config as config_lib
from memdiff import pipeline
from memdiff.classifier import heads
from memdiff.errors import ConfigError, WorkdirError
from memdiff.evaluation import cross_validation
from memdiff.experiments import (
  comparison,
  feature_folds,
  feature_heads,
  feature_scores,
  feature_selection,
  feature_settings,
  feature_store,
  methods,
)
from memdiff.experiments import feature_evaluation as evaluation
from memdiff.experiments.base import Experiment
from memdiff.experiments.feature_folds import Folds
from memdiff.experiments.methods import Choice
from memdiff.fitting.heads import FAMILIES
from memdiff.memory import feature_space
from memdiff.runtime import loop
from memdiff.runtime.progress import Progress
from memdiff.runtime.workdir import Workdir
from tests import support

CLASSES, DIM, STORED = 4, 5, 12
COUNTS = np.array([12, 6, 3, 2])  # of the long tail, out of 12 each
FILL = 9  # the second and the smaller classes get 3, 6 and 7
LOSSES = ("cross_entropy", "logit_adjustment")
EXPONENTS, L2, TAUS = (1.0, 0.5), (5e-4, 5e-2), (1.0, 0.5, 2.0)
METHODS = [f"{name}+{loss}" for name in ("real", "duplicate", "memdiff") for loss in LOSSES]
FITTED = [f"real+{name}" for name in (*FAMILIES, "blend")]
REFERENCES = [f"{name}+{loss}" for name in ("oracle", "unseen_exemplars") for loss in LOSSES]


def write_embeddings(path):
  """Rows around a centre per class, whose names are texts; in no order of class."""
  rng = np.random.default_rng(3)
  centres = 2 * rng.normal(size=(CLASSES, DIM))
  labels = rng.permutation(np.repeat(np.arange(CLASSES), STORED))
  test_labels = np.tile(np.arange(CLASSES), 6)
  np.savez(
    path,
    features=(centres[labels] + rng.normal(size=(len(labels), DIM))).astype(np.float32),
    labels=np.array(list("abcd"))[labels],
    test_features=(centres[test_labels] + rng.normal(size=(24, DIM))).astype(np.float32),
    test_labels=np.array(list("abcd"))[test_labels],
  )


def config_for(path):
  """A run of seconds on the embeddings at `path`."""
  config = features_config.get_config()
  config.seeds = (0, 1)
  config.dataset.update(train_path=str(path), profile="exponential", imbalance=6.0)
  config.diffusion.denoiser.update(width=16, num_blocks=1, embedding_dim=8, num_heads=2)
  config.diffusion.update(num_steps=2, batch_size=8)
  config.hallucination.update(num_steps=2, chunk_size=32)
  config.generators.update(names=("duplicate", "memdiff"), tail_below=10, fill_to=(7, FILL))
  config.head.update(losses=LOSSES, exponents=EXPONENTS, l2=L2, taus=TAUS)
  config.head.training.num_steps = 4
  config.selection.folds = 2
  config.evaluation.map_per_class = 3
  config.loop.update(steps_per_dispatch=2, eval_every=2, checkpoint_every=2)
  return config


def run(config, workdir):
  report = pipeline.run(config.to_dict(), str(workdir), tensorboard=False, command="command")
  assert report == json.loads((workdir / "report.json").read_text())
  return report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(config, workdir, report) of a run with two folds."""
  folder = tmp_path_factory.mktemp("features")
  write_embeddings(folder / "embeddings.npz")
  config = config_for(folder / "embeddings.npz")
  return config, folder / "run", run(config, folder / "run")


def arrays_of(path):
  with np.load(path) as file:
    return dict(file)


@pytest.fixture
def experiment(finished, mesh):
  """The finished run, to look into."""
  config, workdir, _ = finished
  settings = config_lib.build(feature_settings.FeatureConfig, config.to_dict())
  folder = Workdir(str(workdir))
  yield Experiment(
    config=settings,
    dataset=embeddings.load(settings.dataset),
    workdir=folder,
    run=support.make_run(mesh, settings.seeds, settings.loop.steps_per_dispatch),
    command="",
  )
  folder.close()


# --- a run on embeddings ---------------------------------------------------------------------


def test_a_run_on_embeddings_scores_every_method_and_both_references(finished):
  _, workdir, report = finished
  rows = {row["method"]: row for row in report["classification"]}
  assert list(rows) == FITTED + METHODS + REFERENCES  # embeddings come without a head of their own
  assert report["experiment"] == "features"
  assert report["dataset"]["train_counts"] == COUNTS.tolist()
  digests = report["dataset"]["sha256"]
  assert digests["split"] == report["dataset"]["split_sha256"]
  assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests.values())
  for phase in report["timing"]["phases"]:
    written = json.loads((workdir / phase / "manifest.json").read_text())["config"]
    assert {n.removeprefix("data/"): v for n, v in written.items() if "data/" in n} == digests
  assert report["dataset"]["left_out_counts"] == (STORED - COUNTS).tolist()
  assert report["dataset"]["class_names"] == list("abcd")
  assert all(row["seeds"] == [0, 1] and 0 <= row["top1"]["mean"] <= 1 for row in rows.values())
  assert set(report["generators"]) == {"duplicate", "memdiff"}
  assert report["generators"]["duplicate"]["memorization_ratio"]["mean"] == pytest.approx(
    0, abs=1e-3
  )
  phases = ("memory_bank", "diffusion", "selection", "hallucination", "heads", "evaluation")
  assert tuple(report["timing"]["phases"]) == phases
  page = (workdir / "report.html").read_text()
  assert all(method in page for method in rows)


def test_the_features_are_the_rows_of_the_file(finished):
  config, workdir, _ = finished
  file = arrays_of(config.dataset.train_path)
  arrays = arrays_of(workdir / "memory_bank" / "features.npz")
  assert set(arrays) == {"train", "left_out", "test"}
  np.testing.assert_array_equal(arrays["test"], file["test_features"][None])
  used = np.concatenate([arrays["train"][0], arrays["left_out"][0]])
  assert sorted(map(tuple, used)) == sorted(map(tuple, file["features"]))
  assert arrays["train"].shape == (1, COUNTS.sum(), DIM)


def test_one_of_the_methods_is_recommended_on_what_was_held_out(finished):
  _, workdir, report = finished
  found = report["recommendation"]
  made = arrays_of(workdir / "selection" / "predictions.npz")
  assert set(found["scores"]) == {*FITTED, *METHODS} == set(made) - {"label", "example", "run"}
  for method, entry in found["scores"].items():
    per_seed = [(made[method] == c)[made["label"] == c].mean() for c in range(CLASSES)]
    assert entry["score"] == pytest.approx(np.mean(per_seed))
    if method in FITTED:
      family = FAMILIES.get(method.removeprefix("real+"))
      assert entry["settings"] == len(family.settings if family else FAMILIES)
      continue
    number = len(EXPONENTS) * len(L2)
    number *= 1 if method.startswith("real+") else 2  # fills
    number *= len(TAUS) if method.endswith("+logit_adjustment") else 1
    assert entry["settings"] == number
  assert sorted(made["example"]) == list(range(COUNTS.sum()))
  assert found["method"] in (found["best"], found["control"])
  assert found["control"].startswith("real+")
  assert found["basis"] == {"folds": 2, "repeats": 1, "encoder": "frozen"}
  assert report["comparison"]["control"] == found["control"]


def test_choices_are_out_of_the_candidates(finished):
  _, _, report = finished
  assert list(report["choices"]) == METHODS
  for method, choice in report["choices"].items():
    assert choice["exponent"] in EXPONENTS and choice["l2"] in L2
    assert choice["tau"] in (TAUS if method.endswith("+logit_adjustment") else (1.0,))
    if method.startswith("real+"):
      assert (choice["strength"], choice["fill"]) == (0.0, 0)
    else:
      assert choice["fill"] in (7, FILL)
      assert choice["strength"] == (1.0 if method.startswith("memdiff+") else 0.0)


def test_descriptions_say_what_was_chosen(finished):
  _, _, report = finished
  for row in report["classification"]:
    choice = report["choices"].get(row["method"])
    details = []
    if choice:
      details = [f"classes drawn by count^{choice['exponent']:g}", f"L2 {choice['l2']:g}"]
      if row["method"].endswith("+logit_adjustment"):
        details.append(f"tau {choice['tau']:g}")
      if choice["fill"]:
        details.append(f"filled to {choice['fill']}")
    found = row["description"].partition(" (classes")[1:]
    assert "".join(found) == (f" ({', '.join(details)})" if details else "")


@pytest.mark.parametrize("method", ["memdiff+cross_entropy", "real+lda", "real+weighted_logistic"])
def test_the_recommended_head_is_for_the_embeddings_as_they_are(
  finished, experiment, method, tmp_path
):
  config, _, report = finished
  space = feature_store.load_space(experiment)
  choices, recommendation = feature_store.load_selection(experiment)
  scored = feature_scores.classify(experiment, space, choices, recommendation)
  evaluation.save_recommended_head(experiment, space, scored, method, choices)
  head = arrays_of(experiment.workdir.path / "recommended_head.npz")
  file = arrays_of(config.dataset.train_path)
  assert (head["kernel"].shape, head["bias"].shape) == ((2, DIM, CLASSES), (2, CLASSES))
  assert head["class_names"].tolist() == list("abcd")
  made = head["class_names"][
    (file["test_features"] @ head["kernel"] + head["bias"][:, None]).argmax(axis=-1)
  ]
  rows = {row["method"]: row for row in report["classification"]}
  accuracy = (made == file["test_labels"]).mean()
  assert rows[method]["top1"]["mean"] == pytest.approx(accuracy)
  evaluation.save_recommended_head(experiment, space, scored, "real+blend", choices)
  assert not (experiment.workdir.path / "recommended_head.npz").exists()


@pytest.mark.slow
def test_without_folds_settings_come_first_and_nothing_is_recommended(finished, tmp_path):
  """The phases before selection are taken over from the other run."""
  config, workdir, _ = finished
  config = config.copy_and_resolve_references()
  config.selection.folds = 0
  for folder in ("memory_bank", "diffusion"):
    shutil.copytree(workdir / folder, tmp_path / "run" / folder)
  report = run(config, tmp_path / "run")
  assert report["recommendation"] is None
  assert list(report["choices"]) == METHODS
  for method, choice in report["choices"].items():
    name = method.split("+")[0]
    assert choice == {
      "strength": float(name == "memdiff"), "fill": 0 if name == "real" else 7, "exponent": 1.0,
      "l2": L2[0], "tau": TAUS[0],
    }  # fmt: skip
  assert report["comparison"]["control"] == f"real+{LOSSES[0]}"
  assert report["comparison"]["method"] == f"memdiff+{LOSSES[0]}"
  assert (tmp_path / "run" / "recommended_head.npz").exists()
  assert not (tmp_path / "run" / "selection" / "heads").exists()


# --- the references --------------------------------------------------------------------------


def standardised(experiment):
  """Training and left-out rows of the file, moved and scaled by the training rows."""
  data = experiment.dataset
  mean, scale = data.train_features.mean(axis=0), data.train_features.std(axis=0)
  return (data.train_features - mean) / scale, (data.left_out_features - mean) / scale


def test_the_oracle_adds_left_out_rows_as_many_as_would_be_made_or_there_are(experiment):
  space = feature_store.load_space(experiment)
  added = feature_heads._left_out_pool(experiment, space)
  left_out_counts = STORED - COUNTS
  wanted = np.where(COUNTS < 10, np.maximum(FILL - COUNTS, 0), 0)
  np.testing.assert_array_equal(added.numbers, np.minimum(wanted, left_out_counts))
  _, left_out = standardised(experiment)
  labels = experiment.dataset.left_out_labels
  expected = np.concatenate([left_out[labels == c][:n] for c, n in enumerate(added.numbers)])
  assert added.features.shape == (2, 1, *expected.shape)
  for seed in (0, 1):
    np.testing.assert_allclose(added.features[seed, 0], expected, rtol=1e-4, atol=1e-4)
  assert np.all(np.asarray(added.confidence) == 1) and added.confidence.shape == (2, 1, 16)


def test_the_oracle_takes_no_more_than_there_are(experiment):
  space = feature_store.load_space(experiment)
  labels = experiment.dataset.left_out_labels
  few = np.concatenate([np.flatnonzero(labels == c)[: 2 * c] for c in range(CLASSES)])
  fewer = dataclasses.replace(
    experiment,
    dataset=dataclasses.replace(
      experiment.dataset,
      left_out_labels=labels[few],
      left_out_features=experiment.dataset.left_out_features[few],
    ),
  )
  added = feature_heads._left_out_pool(
    fewer, dataclasses.replace(space, left_out=space.left_out[:, few])
  )
  np.testing.assert_array_equal(added.numbers, [0, 2, 4, 6])
  assert added.features.shape == (2, 1, 12, DIM)
  _, left_out = standardised(fewer)
  np.testing.assert_allclose(
    added.features[0, 0, 2:6], left_out[labels[few] == 2], rtol=1e-4, atol=1e-4
  )


def test_unseen_exemplars_stand_in_the_place_of_training_ones_of_their_class(experiment):
  space = feature_store.load_space(experiment)
  made = feature_heads._unseen_exemplars(experiment, space)
  train, left_out = standardised(experiment)
  labels, unseen_labels = experiment.dataset.train_labels, experiment.dataset.left_out_labels
  for seed in (0, 1):
    for c, count in enumerate(COUNTS):
      unseen = left_out[unseen_labels == c][:count]
      per_seed = np.asarray(made.features[seed])[labels == c]
      np.testing.assert_allclose(per_seed[: len(unseen)], unseen, rtol=1e-4, atol=1e-4)
      np.testing.assert_allclose(
        per_seed[len(unseen) :], train[labels == c][len(unseen) :], rtol=1e-4, atol=1e-4
      )
  # The largest class keeps its own, since nothing of it was left out.
  assert not (unseen_labels == 0).any()
  np.testing.assert_array_equal(made.labels, space.runs.exemplars.labels)
  np.testing.assert_array_equal(made.by_class.counts, np.tile(COUNTS, (2, 1)))


def test_heads_of_the_references_train_on_just_these_rows(experiment):
  space = feature_store.load_space(experiment)
  choices, _ = feature_store.load_selection(experiment)
  oracle, unseen, real = (
    feature_heads.head_training(experiment, space, choices, name)
    for name in ("oracle", "unseen_exemplars", "real")
  )
  pool = feature_heads._left_out_pool(experiment, space)
  np.testing.assert_array_equal(oracle.data.added.features, pool.features)
  np.testing.assert_array_equal(oracle.data.exemplars.features, space.runs.exemplars.features)
  expected = feature_heads._unseen_exemplars(experiment, space).features
  np.testing.assert_array_equal(unseen.data.exemplars.features, expected)
  for trained in (unseen, real):
    assert np.sum(trained.data.added.numbers) == 0
  # References are trained as the data come; exemplars that were not seen, as the seen ones are.
  assert {(s.fill, s.exponent) for s in oracle.settings} == {(heads.ALL, 1)}
  assert [dataclasses.replace(s, stream="") for s in unseen.settings] == [
    dataclasses.replace(s, stream="") for s in real.settings
  ]
  assert [s.run for s in oracle.settings] == [0, 1] * len(LOSSES)
  assert oracle.losses == [loss for loss in LOSSES for _ in (0, 1)]


def test_without_left_out_examples_of_filled_classes_there_are_no_references(experiment):
  assert feature_heads.head_names(experiment)[-2:] == ["oracle", "unseen_exemplars"]
  for keep in (np.array([], int), np.flatnonzero(experiment.dataset.left_out_labels == 0)):
    data = dataclasses.replace(
      experiment.dataset,
      left_out_labels=experiment.dataset.left_out_labels[keep],
      left_out_features=experiment.dataset.left_out_features[keep],
    )
    without = dataclasses.replace(experiment, dataset=data)
    assert feature_heads.head_names(without) == ["real", "duplicate", "memdiff"]


# --- the encoder's own head ------------------------------------------------------------------


def test_own_heads_of_folds_are_adjusted_by_what_their_fold_has_seen():
  labels = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
  config = cross_validation.SelectionConfig(
    folds=2, repeats=2, encoder="retrained", criterion="balanced_accuracy"
  )
  _, held_out = cross_validation.fold_rows(labels, config)
  logits = np.random.default_rng(0).normal(size=(*held_out.shape, 3))
  counts = np.array(
    [[90, 9, 1], [1, 90, 9], [9, 1, 90], [30, 30, 40]]
  )  # far apart, so that it tells
  e = SimpleNamespace(
    dataset=SimpleNamespace(train_labels=labels, train_counts=np.array([4, 3, 2])),
    config=SimpleNamespace(head=SimpleNamespace(taus=TAUS)),
  )
  judged = cross_validation.judged_examples(held_out, labels, "balanced_accuracy", 3)
  folds = Folds(None, None, counts, held_out, None, judged, logits)
  found = feature_selection._predict_with_own_heads(e, folds)
  assert list(found) == ["own_head", "own_head+logit_adjustment"]
  plain, adjusted = [], [[] for _ in TAUS]
  for run, row in enumerate(held_out):
    for position in np.flatnonzero(row >= 0):
      per_seed = logits[run, position]
      plain.append(per_seed.argmax())
      for made, tau in zip(adjusted, TAUS, strict=True):
        made.append((per_seed - tau * np.log(counts[run] / 100)).argmax())
  assert len({str(made) for made in (plain, *adjusted)}) == 1 + len(TAUS)
  assert found["own_head"].settings == [Choice()]
  np.testing.assert_array_equal(found["own_head"].predictions, [plain])
  of_taus = found["own_head+logit_adjustment"]
  assert [choice.tau for choice in of_taus.settings] == list(TAUS)
  np.testing.assert_array_equal(of_taus.predictions, adjusted)
  for number, classes in enumerate(adjusted):
    some = np.arange(1, len(classes), 2)
    said = of_taus.logits(number, some).argmax(axis=-1)
    np.testing.assert_array_equal(said, np.array(classes)[some])


def test_own_heads_are_adjusted_as_chosen_or_else_by_the_first_tau(experiment):
  chosen = {"own_head+logit_adjustment": Choice(tau=0.25), "real+csl": Choice(tau=3.0)}
  assert methods.own_tau(experiment, chosen) == 0.25
  assert methods.own_tau(experiment, {}) == TAUS[0]


def test_constant_columns_are_said_in_one_line_or_none():
  features = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
  for columns, words in (([], ""), ([3, 1], "2 of 5 columns are constant .*first is column 1,")):
    features[:, columns] = 1e6
    stream = io.StringIO()
    feature_store.say_constant_columns(Progress(1, stream=stream), features)
    assert stream.getvalue().count("\n") == bool(columns)
    assert re.search(words, stream.getvalue())


@pytest.mark.parametrize("method", ["own_head", "own_head+logit_adjustment", "memdiff+csl"])
def test_a_recommended_head_is_in_the_units_of_the_encoder(method, tmp_path):
  rng = np.random.default_rng(1)
  made = rng.gamma(2.0, size=(1, 30, DIM)).astype(np.float32)
  head = {"kernel": rng.normal(size=(1, DIM, 3)), "bias": rng.normal(size=(1, 3))}
  per_seed = jax.tree.map(lambda x: x.astype(np.float32), head)
  mean, scale = made.mean(axis=1), made.std(axis=1)
  standardizer = feature_space.fit_standardizer(made[0], jnp.ones(30, bool))
  inside = {
    "kernel": per_seed["kernel"] * scale[:, :, None],
    "bias": per_seed["bias"] + np.einsum("sd,sdc->sc", mean, per_seed["kernel"]),
  }
  counts = np.array([20, 8, 2])
  e = SimpleNamespace(
    dataset=SimpleNamespace(train_counts=counts, class_names=("x", "y", "z")),
    workdir=SimpleNamespace(path=tmp_path),
    config=SimpleNamespace(head=SimpleNamespace(taus=TAUS)),
  )
  runs = SimpleNamespace(head=inside, standardizer=jax.tree.map(lambda x: x[None], standardizer))
  trained = {"memdiff+csl": jax.tree.map(lambda x: 2 * x, inside)}
  scored = comparison.Scored([], {}, trained, np.array([0]), "accuracy", ())
  choices = {"own_head+logit_adjustment": Choice(tau=0.5)}
  evaluation.save_recommended_head(e, SimpleNamespace(runs=runs), scored, method, choices)
  saved = arrays_of(tmp_path / "recommended_head.npz")
  assert saved["class_names"].tolist() == ["x", "y", "z"]
  expected = per_seed["bias"] - (0.5 * np.log(counts / 30) if method.endswith("adjustment") else 0)
  factor = 2 if method == "memdiff+csl" else 1
  np.testing.assert_allclose(saved["kernel"], factor * per_seed["kernel"], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(saved["bias"], factor * expected, rtol=1e-3, atol=1e-3)


def test_features_have_a_head_where_one_was_trained_on_them_or_read():
  def of(**changes):
    config = digits_lt.get_config("smoke")
    for path, value in changes.items():
      config.update_from_flattened_dict({path.replace("__", "."): value})
    return feature_settings.has_own_head(
      config_lib.build(feature_settings.MemdiffConfig, config.to_dict())
    )

  assert of()
  assert of(encoder__init_head=False)  # drawn anew, then trained
  assert of(classifier__num_epochs=0.0)  # read
  assert not of(classifier__num_epochs=0.0, encoder__init_head=False)
  assert not of(encoder__backbone__taps=("2:2",))
  config = features_config.get_config().to_dict()
  settings = config_lib.build(feature_settings.FeatureConfig, config)
  assert not feature_settings.has_own_head(settings)


# --- settings that do not fit ----------------------------------------------------------------


def data_of(counts=(12, 6, 3, 2), **more):
  return SimpleNamespace(
    train_counts=np.array(counts), **({"name": "pets", "streamed": False} | more)
  )


def check(config, data):
  """Asks the last check of the config's kind, which needs no images."""
  kind = pipeline.kind_of(config.to_dict())
  kind.checks[-1](config_lib.build(kind.settings, config.to_dict()), data)


@pytest.mark.parametrize(
  ("changes", "counts", "words"),
  [
    ({"head.training.start": "encoder"}, None, "start is encoder, but these features come without"),
    ({"generators.confidence.name": "certainty"}, None, "certainty, which asks the encoder's own"),
    ({"generators.confidence.name": "entropy_literal"}, None, "use cosine or none"),
    ({"generators.confidence.name": "probability"}, None, "use cosine or none"),
    ({"selection.encoder": "retrained"}, None, "embeddings have no encoder to train"),
    (
      {"generators.names": ("memdiff", "memdiff_described")},
      None,
      "generator memdiff_described is told .* but config.class_embeddings is empty; give it",
    ),
    ({"generators.fill_to": (2,)}, None, r"no class .* tail_below=10 .* fill_to=2"),
    ({"generators.tail_below": 2}, None, r"no class .*smallest class has 2, the largest 12\); set"),
    ({"generators.tail_below": 5}, (40, 9), "set tail_below above 9 and fill_to above that"),
    ({}, (20, 20, 20), "all classes have 20, so there is no tail to fill; cut one"),
    ({"head.training.start": "encoder", "selection.folds": 0}, None, "come without a head"),
    ({}, (1, 1, 1, 1), "no class has two examples; set it to 0"),
  ],
)
def test_settings_that_do_not_fit_embeddings_are_refused(changes, counts, words):
  config = config_for("x.npz")
  check(config, data_of())
  config.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=words):
    check(config, data_of(counts or COUNTS))


def test_without_folds_classes_of_one_example_are_fine():
  config = config_for("x.npz")
  config.selection.folds = 0
  check(config, data_of((1, 1, 1)))


BEGIN = {"head.training.start": "encoder", "selection.folds": 0}
TAPS = {"encoder.backbone.taps": ("2:2",)}
READ = {"classifier.num_epochs": 0.0}


@pytest.mark.parametrize(
  ("changes", "data", "words"),
  [
    (TAPS | BEGIN, {}, "start is encoder, but these features come without a head"),
    (READ | BEGIN | {"encoder.init_head": False}, {}, "but these features come without a head"),
    ({"head.training.start": "encoder"}, {}, "set start to zeros, or config.selection.folds to 0"),
    (
      TAPS | {"head.training.start": "zeros", "generators.confidence.name": "probability"},
      {},
      "use cosine or none",
    ),
    ({"classifier.loss": "ldam"}, {}, "the loss ldam has a cosine head"),
    ({"classifier.references": ("ldam_drw",)}, {}, "the loss ldam_drw has a cosine head"),
    ({"encoder.backbone.head": "cosine"}, {}, "the loss csl has a cosine head"),
    (READ | {"selection.encoder": "retrained"}, {}, "but config.classifier.num_epochs is 0"),
    ({"selection.encoder": "retrained"}, {"streamed": True}, "pets is streamed from disk"),
    ({"generators.fill_to": (2,)}, {}, "no class with fewer than tail_below"),
  ],
)
def test_settings_that_do_not_fit_an_encoder_are_refused(changes, data, words):
  config = digits_lt.get_config("smoke")
  check(config, data_of())
  config.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=words):
    check(config, data_of(**data))


def test_frozen_folds_do_not_begin_with_a_head_that_knows_what_they_are_judged_on():
  """One sentence; heads may begin with the encoder's where folds train their own, or are none."""
  config = digits_lt.get_config("smoke")
  config.head.training.start = "encoder"
  with pytest.raises(ConfigError) as refused:
    check(config, data_of())
  words = str(refused.value)
  assert "config.head.training.start" in words and "config.selection.encoder" in words
  assert words.endswith(".") and words.count(". ") == 0
  for changes in ({"selection.encoder": "retrained"}, {"selection.folds": 0}):
    allowed = config.copy_and_resolve_references()
    allowed.update_from_flattened_dict(changes)
    check(allowed, data_of())


def test_what_only_the_retrained_encoder_or_the_head_lacks_is_no_obstacle_without_them():
  for changes, data in (
    (READ, {}),
    ({"selection.encoder": "retrained"}, {}),
    ({"selection.encoder": "retrained", "selection.folds": 0}, {"streamed": True}),
    (TAPS | {"head.training.start": "zeros"}, {}),
    ({"classifier.loss": "ldam", "encoder.backbone.head": "linear"}, {}),
    ({"generators.confidence.name": "probability"}, {}),
  ):
    config = digits_lt.get_config("smoke")
    config.update_from_flattened_dict(changes)
    check(config, data_of(**data))


def test_a_run_is_refused_before_its_workdir_is_made(tmp_path):
  write_embeddings(tmp_path / "embeddings.npz")
  config = config_for(tmp_path / "embeddings.npz")
  config.head.training.start = "encoder"
  with pytest.raises(ConfigError, match=r"set it to zeros\.$"):
    pipeline.run(config.to_dict(), str(tmp_path / "run"), tensorboard=False, command="")
  assert not (tmp_path / "run").exists()


def test_an_unknown_kind_is_refused_with_those_that_exist():
  for values in ({}, {"experiment": "magic"}):
    with pytest.raises(ConfigError, match="must be one of memdiff, features, classification"):
      pipeline.kind_of(values)


# --- candidates ------------------------------------------------------------------------------


def test_candidates_are_all_settings_with_the_plain_ones_first(experiment):
  plain = methods.candidates(experiment, "real", "cross_entropy")
  assert plain == [Choice(0.0, 0, x, l2, 1.0) for x in EXPONENTS for l2 in L2]
  adjusted = methods.candidates(experiment, "real", "logit_adjustment")
  assert adjusted == [dataclasses.replace(c, tau=tau) for tau in TAUS for c in plain]
  made = methods.candidates(experiment, "memdiff", "csl")
  assert made == [Choice(1.0, f, x, l2, 1.0) for f in (7, FILL) for x in EXPONENTS for l2 in L2]
  jittered = methods.candidates(experiment, "kernel_jitter", "logit_adjustment")
  assert len(jittered) == len(set(jittered)) == 3 * 5 * 2 * 2 * 2
  published = methods.candidates(experiment, "ldmlr_published", "csl")
  assert {c.fill for c in published} == {heads.ALL}


# --- folds -----------------------------------------------------------------------------------


@pytest.fixture
def selected(experiment, monkeypatch):
  """name -> (folds, settings, stage, parameters of the heads, predictions) of its selection.

  Heads are not trained but drawn, each by itself.
  """
  made = {}

  def watched(name, config, data, settings, mesh):
    made.update(settings=settings, stage=make_stage(name, config, data, settings, mesh))
    return made["stage"]

  def draw(stage, run, folder):
    rng = np.random.default_rng(1)
    shapes = jax.tree.map(np.shape, stage.per_seed["start"], is_leaf=lambda x: hasattr(x, "shape"))
    made["params"] = {
      name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    return SimpleNamespace(params=made["params"])

  make_stage = heads.make_stage
  folds = feature_folds.make_folds(experiment)
  monkeypatch.setattr(heads, "make_stage", watched)
  monkeypatch.setattr(loop, "train", draw)

  def select(name):
    predicted = feature_selection._predict_with(experiment, folds, name)
    return folds, made["settings"], made["stage"], made["params"], predicted

  return select


@pytest.mark.parametrize("name", ["real", "duplicate"])
def test_every_candidate_is_judged_by_its_own_heads_and_the_prior_of_its_fold(
  selected, experiment, name
):
  folds, settings, stage, params, predicted = selected(name)
  assert list(predicted) == list(LOSSES)
  features, prior = np.asarray(folds.features), np.asarray(stage.per_seed["mixture"].prior)
  for loss in LOSSES:
    choices = methods.candidates(experiment, name, loss)
    assert predicted[loss].settings == choices
    for number, choice in enumerate(choices):
      expected = []
      for run in range(2):
        (head,) = [
          i for i, s in enumerate(settings)
          if (s.run, s.fill, s.exponent, s.l2) == (run, choice.fill, choice.exponent, choice.l2)
        ]  # fmt: skip
        logits = features[run] @ params["kernel"][head] + params["bias"][head]
        if loss == "logit_adjustment":
          logits = logits - choice.tau * np.log(prior[head])
        expected.append(logits[folds.held_out[run] >= 0])
      expected = np.concatenate(expected)
      classes = predicted[loss].predictions[number]
      np.testing.assert_array_equal(classes, expected.argmax(axis=-1))
      some = np.arange(0, len(expected), 3)
      said = predicted[loss].logits(number, some)
      np.testing.assert_allclose(said, expected[some], rtol=1e-4, atol=1e-4)


def test_strengths_in_parts_are_judged_as_they_are_at_once(experiment, monkeypatch):
  folds = feature_folds.make_folds(experiment)
  at_once = feature_selection._predict_with(experiment, folds, "kernel_jitter")
  monkeypatch.setattr(feature_selection, "_AT_ONCE", 1)
  in_parts = feature_selection._predict_with(experiment, folds, "kernel_jitter")
  trained = experiment.workdir.path / "selection" / "heads" / "kernel_jitter"
  assert {path.name for path in trained.iterdir() if path.name.isdigit()} == set("01234")
  for loss in LOSSES:
    assert len(np.unique(at_once[loss].predictions, axis=0)) > 1
    np.testing.assert_array_equal(in_parts[loss].predictions, at_once[loss].predictions)
    last, some = len(at_once[loss].settings) - 1, np.arange(5)
    np.testing.assert_array_equal(
      in_parts[loss].logits(last, some), at_once[loss].logits(last, some)
    )


def test_folds_know_what_they_train_on_and_their_prior_is_that(selected, experiment):
  folds, settings, stage, *_ = selected("real")
  labels = experiment.dataset.train_labels
  for run in range(2):
    held = labels[folds.held_out[run][folds.held_out[run] >= 0]]
    np.testing.assert_array_equal(folds.counts[run], COUNTS - np.bincount(held, minlength=CLASSES))
  assert (folds.counts[0] != folds.counts[1]).any()
  for setting, prior in zip(settings, np.asarray(stage.per_seed["mixture"].prior), strict=True):
    drawn = folds.counts[setting.run] ** setting.exponent
    np.testing.assert_allclose(prior, drawn / drawn.sum(), rtol=1e-5)


def test_folds_are_filled_as_far_as_their_share_of_the_training_set_goes(selected):
  """So that the largest class stays the largest, and real and synthetic rows mix alike."""
  folds, settings, stage, *_ = selected("duplicate")
  made = np.where(COUNTS < 10, np.maximum(FILL - COUNTS, 0), 0)
  assert {s.fill for s in settings} == {7, FILL}
  for setting, used in zip(settings, np.asarray(stage.per_seed["mixture"].used), strict=True):
    counts = folds.counts[setting.run]
    share = counts.sum() / COUNTS.sum()
    assert setting.share == pytest.approx(share)
    whole = np.clip(setting.fill - COUNTS, 0, made)
    np.testing.assert_allclose(counts + used, share * (COUNTS + whole), atol=1.5)
    assert (counts + used).argmax() == 0


def test_folds_have_random_streams_of_their_own(selected, experiment):
  """Fold r is no copy of seed r: neither its bank, nor what is made for it, nor its heads."""
  folds, _, stage, *_ = selected("real")
  assert folds.run.seeds == experiment.run.seeds == (0, 1)
  for name in ("memory_bank", "sample/memdiff", "diffusion/memdiff"):
    keys = [jax.random.key_data(run.keys(name)) for run in (folds.run, experiment.run)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 4
  space = feature_store.load_space(experiment)
  choices, _ = feature_store.load_selection(experiment)
  per_seed = feature_heads.head_training(experiment, space, choices, "real").stage.per_seed
  assert not set(np.asarray(per_seed["stream"]).tolist()) & set(
    np.asarray(stage.per_seed["stream"]).tolist()
  )


def test_heads_do_not_depend_on_the_number_or_order_of_seeds_and_losses(experiment):
  space = feature_store.load_space(experiment)
  choices, _ = feature_store.load_selection(experiment)

  def of(seeds, losses):
    rows = np.array(seeds)
    config = dataclasses.replace(
      experiment.config,
      seeds=seeds,
      head=dataclasses.replace(experiment.config.head, losses=losses),
    )
    part = dataclasses.replace(
      space,
      runs=jax.tree.map(lambda x: x[rows], space.runs),
      left_out=space.left_out[rows],
      test=space.test[rows],
    )
    e = dataclasses.replace(experiment, config=config)
    trained = feature_heads.head_training(e, part, choices, "real")
    per_seed = {name: v for name, v in trained.stage.per_seed.items() if name != "run"}
    return {
      (loss, config.seeds[s.run]): jax.tree.map(lambda x, i=i: np.asarray(x[i]), per_seed)
      for i, (loss, s) in enumerate(zip(trained.losses, trained.settings, strict=True))
    }

  everything = of((0, 1), LOSSES)
  assert len(everything) == 4
  for part in (of((1,), LOSSES), of((1, 0), LOSSES[::-1]), of((0,), LOSSES[1:])):
    for key, per_seed in part.items():
      jax.tree.map(np.testing.assert_array_equal, per_seed, everything[key])
  per_seed = everything["cross_entropy", 0], everything["cross_entropy", 1]
  assert per_seed[0]["seed"] != per_seed[1]["seed"]


@pytest.mark.parametrize("name", ["real", "memdiff", "oracle"])
def test_heads_are_read_as_they_were_trained_each_loss_by_itself(experiment, name):
  space = feature_store.load_space(experiment)
  choices, _ = feature_store.load_selection(experiment)
  trained = feature_heads.head_training(experiment, space, choices, name)
  folder = experiment.workdir.folder("heads") / name
  params = loop.train(trained.stage, trained.run, folder).params  # it is finished
  prior = np.asarray(trained.stage.per_seed["mixture"].prior)
  found = feature_heads.final_heads(experiment, choices, name)
  assert list(found) == list(LOSSES)
  for i, (loss, setting) in enumerate(zip(trained.losses, trained.settings, strict=True)):
    kernel, bias = np.asarray(params["kernel"][i]), np.asarray(params["bias"][i])
    if loss == "logit_adjustment":
      choice = choices.get(f"{name}+{loss}") or choices[f"real+{loss}"]
      bias = bias - choice.tau * np.log(prior[i])
    np.testing.assert_array_equal(found[loss]["kernel"][setting.run], kernel)
    np.testing.assert_allclose(found[loss]["bias"][setting.run], bias, rtol=1e-6, atol=1e-6)


# --- choices ---------------------------------------------------------------------------------


def test_a_broken_choice_is_named_with_what_to_remove(experiment, monkeypatch, tmp_path):
  (tmp_path / "choices.json").write_text("{")
  monkeypatch.setattr(experiment.workdir, "folder", lambda _: tmp_path)
  with pytest.raises(WorkdirError, match=r"Cannot read .*; remove .*choices\.json and run"):
    feature_store.load_selection(experiment)


# --- synthetic embeddings back ---------------------------------------------------------------


def test_the_synthetic_embeddings_are_those_of_the_first_seed(finished):
  _, workdir, report = finished
  made = arrays_of(workdir / "synthetic_embeddings.npz")
  name = set(made["method"].tolist())
  assert len(name) == 1
  name = name.pop()
  recommended = report["recommendation"]["method"].split("+")
  loss = recommended[1] if recommended[0] == name else report["comparison"]["method"].split("+")[1]
  saved = arrays_of(workdir / "hallucination" / f"{name}.npz")
  k = saved["strengths"].tolist().index(report["choices"][f"{name}+{loss}"]["strength"])
  np.testing.assert_array_equal(made["features"], saved["features"][0, k])
  np.testing.assert_array_equal(made["confidence"], saved["confidence"][0, k])
  np.testing.assert_array_equal(made["labels"], np.array(list("abcd"))[saved["labels"]])
  np.testing.assert_array_equal(made["num_exemplars"], COUNTS[saved["labels"]])


@pytest.mark.slow
def test_a_folder_of_parquet_in_parquet_out_with_a_class_of_one_row(tmp_path):
  """The class of one is never held out, trains, and gets synthetic rows; the file can be read."""
  rng = np.random.default_rng(0)
  labels = np.repeat([7, 11, 30], [14, 6, 1])
  rows = (rng.normal(size=(21, DIM)) + labels[:, None] / 5).astype(np.float32)
  table = pa.table({"features": list(rows), "label": labels})
  (tmp_path / "train").mkdir()
  for part, start in enumerate(range(0, 21, 9)):
    parquet.write_table(table.slice(start, 9), tmp_path / "train" / f"part-{part}.parquet")
  config = config_for(tmp_path / "train")
  config.dataset.update(profile="natural", test_share=0.3)
  report = run(config, tmp_path / "run")
  counts = np.array(report["dataset"]["train_counts"])
  assert counts[2] == 1 and counts.sum() + report["dataset"]["test_count"] == 21
  assert report["comparison"]["reference"] is None  # nothing was left out
  made = parquet.read_table(tmp_path / "run" / "synthetic_embeddings.parquet").to_pydict()
  number = {label: made["label"].count(label) for label in (7, 11, 30)}
  expected = np.where(counts < 10, np.maximum(FILL - counts, 0), 0)
  np.testing.assert_array_equal(list(number.values()), expected)
  assert np.isfinite(np.array(made["features"])).all()
  of_one = [row for row, label in zip(made["nearest_row"], made["label"], strict=True)
            if label == 30]  # fmt: skip
  assert set(of_one) == {20}  # the file's only row of that class
  assert (tmp_path / "run" / "report.html").exists()
