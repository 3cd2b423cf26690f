"""Every generator by the one interface: how much it makes, of what, and how far it is trusted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.config import as_dict, build
from memdiff.diffusion.schedules import ScheduleConfig
from memdiff.diffusion.terms import ObjectiveConfig
from memdiff.errors import ConfigError, WorkdirError
from memdiff.memory import exemplars as exemplars_lib
from memdiff.memory import feature_space
from memdiff.memory.memory_bank import BankConfig
from memdiff.runtime.random import base_keys
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.synthesis import confidence as confidence_lib
from memdiff.synthesis import fasa, generators, ldmlr, memory_diffusion
from memdiff.synthesis.confidence import ConfidenceConfig
from memdiff.synthesis.denoisers import DenoiserConfig
from memdiff.synthesis.fasa import FASAConfig
from memdiff.synthesis.feature_diffusion import DiffusionConfig
from memdiff.synthesis.generators import GENERATORS, GeneratorsConfig, SynthesisSettings
from memdiff.synthesis.hallucination import SamplerConfig
from memdiff.synthesis.untrained import UNTRAINED
from tests import support
from tests.synthesis.tiny_denoiser import TinyDenoiser

COUNTS = np.array([12, 9, 5, 2])
CLASSES, DIM, BANK = len(COUNTS), 6, BankConfig(num_slots=4, horizon=1000)
MADE = np.array([0, 3, 7, 5])
LABELS = np.repeat(np.arange(CLASSES), MADE)
OPTIMIZER = OptimizerConfig("adamw", 1e-2, "constant", (), (), 0.9, False, 0.0, 0.0, 1.0, 1)
CONFIG = GeneratorsConfig(
  names=("duplicate",), tail_below=10, fill_to=(8, 20),
  confidence=ConfidenceConfig("cosine", power=1.0, calibrate=False, normalize=False),
  fasa=FASAConfig(num_epochs=4, batch_size=8, optimizer=OPTIMIZER), ldmlr_share=1.0,
)  # fmt: skip
SETTINGS = SynthesisSettings(
  generators=CONFIG,
  diffusion=DiffusionConfig(
    schedule=ScheduleConfig("cosine", 20), prediction="v", objective=ObjectiveConfig(),
    ema_decay=0.9, num_steps=4, optimizer=OPTIMIZER,
    denoiser=DenoiserConfig("mlp", width=16, num_blocks=1, embedding_dim=8, num_heads=1),
    condition="class_and_memory", class_exponent=0.5, label_dropout=0.1, anonymous=0.5,
    displacement=1.0, batch_size=16,
  ),
  hallucination=SamplerConfig(
    sampler="ddim", num_steps=4, condition="memory", guidance=(1.0, 2.0), start=(1.0,),
    x0_limit=6.0, chunk_size=64,
  ),
  num_classes=CLASSES,
)  # fmt: skip
ALL = sorted(GENERATORS)
TRAINED = ["class_only", "ldmlr", "ldmlr_published", "memdiff", "memdiff_described"]
KNOWN = np.random.default_rng(0).normal(size=(CLASSES, 3)).astype(np.float32)


@pytest.fixture(autouse=True, scope="module")
def small_rows():
  """LDMLR's rows as published but in size."""
  before, make_denoiser = dict(ldmlr.ROWS), ldmlr.make_denoiser
  ldmlr.make_denoiser = lambda config, num_classes, dim: TinyDenoiser(num_classes, dim)
  for name, row in before.items():
    ldmlr.ROWS[name] = dataclasses.replace(
      row, batch_size=16, num_steps=4, sample_steps=4,
      schedule=ScheduleConfig("cosine", 20),
    )  # fmt: skip
  yield
  ldmlr.ROWS.update(before)
  ldmlr.make_denoiser = make_denoiser


# --- how much --------------------------------------------------------------------------------


@given(
  st.lists(st.integers(1, 200), min_size=2, max_size=10),
  st.integers(1, 150),
  st.lists(st.integers(1, 250), min_size=1, max_size=3),
)
def test_tail_classes_are_filled_up_to_the_largest_target_and_no_others(
  counts, tail_below, fill_to
):
  config = dataclasses.replace(CONFIG, tail_below=tail_below, fill_to=tuple(fill_to))
  expected = [max(max(fill_to) - n, 0) if n < tail_below else 0 for n in counts]
  if sum(expected) == 0:
    with pytest.raises(ConfigError, match=f"tail_below={tail_below} .*fill_to={max(fill_to)}"):
      generators.plan(np.array(counts), config)
    # What the sentence advises is enough, and no less is.
    below = min(counts) + 1
    advised = dataclasses.replace(config, tail_below=below, fill_to=(below + 1,))
    assert (generators.plan(np.array(counts), advised) > 0).tolist() == [
      n == min(counts) for n in counts
    ]
  else:
    made = generators.plan(np.array(counts), config)
    assert made.tolist() == expected and made.dtype == np.int32


@pytest.mark.parametrize(
  ("counts", "tail_below", "words"),
  [
    ((60, 9), 5, "the smallest class has 9, the largest 60); set tail_below above 9 and fill_to"),
    ((90, 50, 40), 20, "set tail_below above 40 and fill_to above that"),
    ((12, 12, 12), 20, "all classes have 12, so there is no tail to fill; cut one with"),
    ((30, 30), 20, "all classes have 30, so there is no tail to fill; cut one with"),
  ],
)
def test_where_nothing_needs_filling_one_sentence_says_what_to_set(counts, tail_below, words):
  config = dataclasses.replace(CONFIG, tail_below=tail_below, fill_to=(10,))
  with pytest.raises(ConfigError) as refused:
    generators.plan(np.array(counts), config)
  text = str(refused.value)
  assert words in text and text.endswith(".") and ". " not in text


@pytest.mark.parametrize("name", ALL)
def test_numbers_follow_the_plan_but_for_the_published_fifth(name):
  counts = np.array([500, 60, 9, 1])
  expected = [0, 0, 11, 19]
  if name == "ldmlr_published":
    expected = [100, 12, 5, 5]
  made = SETTINGS.numbers(name, counts)
  assert made.tolist() == expected and made.dtype == np.int32
  fixed = SETTINGS.generator(name).numbers(counts)
  assert (fixed is None) == (name != "ldmlr_published")


def test_strengths_are_candidates_of_the_generator_or_scales_of_guidance():
  for name in ALL:
    expected = (1.0,)
    if name in UNTRAINED:
      expected = UNTRAINED[name][1].strengths
    if name in ("memdiff", "memdiff_described"):
      expected = (1.0, 2.0)
    assert SETTINGS.generator(name).strengths == expected


def test_every_generator_has_a_name_a_description_and_equal_programs():
  assert set(UNTRAINED) | {"fasa"} | set(TRAINED) == set(GENERATORS)
  assert len({row.description for row in GENERATORS.values()}) == len(GENERATORS)
  for name in ALL:
    assert SETTINGS.generator(name).trains == (name in TRAINED)
    assert SETTINGS.generator(name) == SETTINGS.generator(name)
    assert hash(SETTINGS.generator(name)) == hash(SETTINGS.generator(name))
  values = as_dict(CONFIG) | {"names": tuple(ALL)}
  assert build(GeneratorsConfig, values).names == tuple(ALL)


@pytest.mark.parametrize(
  ("names", "words"),
  [((), "names is empty"), (("memdif",), "memdif"), (("fasa", "fasa"), "distinct")],
)
def test_names_must_be_known_and_some(names, words):
  with pytest.raises(ConfigError, match=words):
    build(GeneratorsConfig, as_dict(CONFIG) | {"names": names})


@pytest.mark.parametrize("fill_to", [(), (0,), (5, -1)])
def test_targets_are_whole_numbers_from_one(fill_to):
  with pytest.raises(ConfigError, match="fill_to"):
    build(GeneratorsConfig, as_dict(CONFIG) | {"fill_to": fill_to})


# --- what they learn from --------------------------------------------------------------------


def make_raw(seed):
  """Features of a ReLU encoder, but for the last dimension; classes lie apart."""
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.repeat(np.arange(CLASSES), COUNTS))
  centres = 4 * np.eye(CLASSES, DIM) + 0.5 * seed
  features = centres[labels] + 0.5 * rng.normal(size=(len(labels), DIM))
  features[:, :-1] = np.maximum(features[:, :-1], 0)
  return features.astype(np.float32), labels


def judge_by(config):
  def judge(features, labels, exemplars, head):
    known = confidence_lib.class_statistics(exemplars, head, config)
    return confidence_lib.confidence(features, labels, known, head, config)

  return jax.jit(judge)


def make_runs(mesh, data_seeds, bank_from=None):
  """Runs of such features; the bank may be one of other features."""
  raw, labels = map(np.stack, zip(*map(make_raw, data_seeds), strict=True))
  stored = raw if bank_from is None else np.stack([make_raw(seed)[0] for seed in bank_from])
  keys = base_keys((0,) * len(labels), "memory_bank")
  bank = feature_space.fill_bank(stored, labels, CLASSES, keys, BANK, mesh)
  head = {
    "kernel": np.stack([np.eye(DIM, CLASSES, dtype=np.float32)] * len(labels)),
    "bias": np.zeros((len(labels), CLASSES), np.float32),
  }
  runs = feature_space.make_runs(raw, labels, bank, head, CLASSES, mesh)
  return feature_space.with_class_embeddings(runs, KNOWN, mesh)


@pytest.fixture(scope="module")
def runs(mesh):
  """The third has the data of the first."""
  return make_runs(mesh, (0, 1, 0))


SEEDS = (5, 6, 5)


def train_and_make(
  name, runs, mesh, folder, seeds=SEEDS, settings=SETTINGS, chosen=None, streams=""
):
  run = support.make_run(mesh, seeds, 4, streams=streams)
  chosen = chosen or settings.generator(name).strengths[:2]
  own = folder / "diffusion" / name
  generators.train(name, settings, runs, run, own, f"diffusion/{name}")
  return generators.make(name, settings, runs, run, own, MADE, chosen)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp("generators")


@pytest.fixture(scope="module")
def made(runs, mesh, workdir):
  """Name -> what the generator makes of the runs at up to two strengths."""
  return functools.cache(lambda name: train_and_make(name, runs, mesh, workdir))


# --- what holds for all ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_generator_makes_features_of_the_classes_asked_for(made, runs, name):
  result, num_strengths = made(name), len(SETTINGS.generator(name).strengths[:2])
  assert result.features.shape == (3, num_strengths, len(LABELS), DIM)
  assert result.confidence.shape == (3, num_strengths, len(LABELS))
  np.testing.assert_array_equal(result.labels, LABELS)
  np.testing.assert_array_equal(result.number, [*range(3), *range(7), *range(5)])
  assert np.isfinite(result.features).all() and np.isfinite(result.confidence).all()
  assert (np.asarray(result.confidence) >= 0).all() and np.asarray(result.confidence).any()


@pytest.mark.parametrize("name", ALL)
def test_features_are_nowhere_negative_where_training_features_are_not(made, runs, name):
  s = jax.tree.map(lambda leaf: np.asarray(leaf)[:, None, None], runs.standardizer)
  raw = np.asarray(made(name).features) * s.scale + s.mean
  assert raw[..., :-1].min() > -1e-4
  assert (raw[..., -1] < 0).any() or name in ldmlr.ROWS  # hardly trained


@pytest.mark.parametrize("name", ALL)
def test_seeds_decide_what_is_made(made, runs, mesh, tmp_path, name):
  features = np.asarray(made(name).features)
  if name not in ldmlr.ROWS:  # where the order of the data is another in every run
    np.testing.assert_array_equal(features[0], features[2])  # same data, same seed
  other = train_and_make(name, runs, mesh, tmp_path, (5, 6, 7))
  np.testing.assert_array_equal(other.features[:2], features[:2])
  differ = (np.asarray(other.features[2]) != features[2]).any(axis=-1)
  assert differ.mean() > 0.3  # a class of two has two duplicates


@pytest.mark.parametrize("name", ["class_only", "duplicate", "fasa", "kernel_jitter"])
def test_streams_keep_folds_and_seeds_of_one_number_apart(made, runs, mesh, tmp_path, name):
  folds = train_and_make(name, runs, mesh, tmp_path, streams="folds/")
  differ = (np.asarray(folds.features) != np.asarray(made(name).features)).any(axis=-1)
  assert differ.mean() > 0.3


@pytest.mark.parametrize("name", sorted({*UNTRAINED, "fasa"} - {"distribution_calibration"}))
def test_features_lie_at_the_class_and_the_run_they_are_made_for(made, runs, name):
  features, confidence = (np.asarray(x) for x in (made(name).features, made(name).confidence))
  hits = []
  for run in range(2):
    real, labels = np.asarray(runs.exemplars.features[run]), np.asarray(runs.exemplars.labels[run])
    means = np.stack([real[labels == c].mean(axis=0) for c in range(CLASSES)])
    nearest = np.linalg.norm(features[run, 0][:, None] - means[None], axis=2).argmin(axis=1)
    hits.append((nearest == LABELS).mean())
  assert min(hits) > 0.8
  assert (confidence[:2] > 0).mean() > 0.8


@pytest.mark.parametrize("name", sorted(set(ALL) - {"fasa"}))
def test_confidence_is_that_of_what_the_head_trains_on(made, runs, name):
  result, config = made(name), CONFIG.confidence
  judge = judge_by(config)
  for run in range(3):
    exemplars, head = jax.tree.map(lambda leaf, run=run: leaf[run], (runs.exemplars, runs.head))
    for features, confidence in zip(result.features[run], result.confidence[run], strict=True):
      expected = judge(features, jnp.asarray(LABELS), exemplars, head)
      np.testing.assert_allclose(confidence, expected, rtol=1e-4, atol=1e-5)


# --- one by one ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kernel_jitter", "gaussian_shrunk", "duplicate"])
def test_runs_that_share_exemplars_make_what_runs_with_copies_make(mesh, tmp_path, name):
  raw, labels = make_raw(0)
  labels, made = np.stack([labels] * 3), []
  for features in (raw[None], np.stack([raw] * 3)):
    bank = feature_space.fill_bank(
      features, labels, CLASSES, base_keys((0,) * 3, "memory_bank"), BANK, mesh
    )
    runs = feature_space.make_runs(features, labels, bank, None, CLASSES, mesh)
    assert runs.alike == (len(features) == 1)
    made.append(train_and_make(name, runs, mesh, tmp_path))
  np.testing.assert_allclose(made[0].features, made[1].features, rtol=1e-5, atol=1e-5)
  assert np.abs(made[0].features[0] - made[0].features[1]).max() > 0.01  # of seeds 5 and 6


def test_samples_of_all_strengths_are_in_memory_once(mesh):
  """Else the strengths that cross-validation tries take twice their room, or thrice."""
  num_runs, rows, dim, number, num_strengths = 3, 200, 32, 500, 20

  def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)

  whole = functools.partial(shape, num_runs, dtype=jnp.int32)
  by_class = exemplars_lib.ByClass(whole(rows), whole(CLASSES), whole(CLASSES))
  runs = feature_space.FeatureRuns(
    exemplars=exemplars_lib.Exemplars(shape(num_runs, rows, dim), whole(rows), by_class),
    bank=None,
    standardizer=feature_space.Standardizer(*[shape(num_runs, dim)] * 3),
    head={"kernel": shape(num_runs, dim, CLASSES), "bias": shape(num_runs, CLASSES)},
  )
  numbers = (number, *(0,) * (CLASSES - 1))
  program = generators.sampling_program(
    SETTINGS.generator("kernel_jitter"), CONFIG.confidence, dim, numbers, mesh
  )
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_runs))
  lowered = program.lower(keys, shape(num_strengths), runs, shape(num_runs, dim, dim))
  memory = lowered.compile().memory_analysis()
  assert memory.output_size_in_bytes >= 4 * num_runs * num_strengths * number * dim
  assert memory.temp_size_in_bytes < 0.5 * memory.output_size_in_bytes


def test_duplicates_are_exemplars_of_the_run(made, runs):
  for run in range(2):
    real, labels = np.asarray(runs.exemplars.features[run]), np.asarray(runs.exemplars.labels[run])
    for feature, label in zip(np.asarray(made("duplicate").features[run, 0]), LABELS, strict=True):
      distance = np.abs(real[labels == label] - feature).max(axis=1)
      assert distance.min() < 1e-4


def test_strengths_come_in_the_order_they_are_chosen(runs, mesh, tmp_path):
  """Without strength there are means of classes, and none of them is below zero."""
  result = train_and_make("gaussian_shared", runs, mesh, tmp_path, chosen=(0.5, 0.0, 2.0))
  labels = np.asarray(runs.exemplars.labels[1])
  means = np.stack(
    [np.asarray(runs.exemplars.features[1])[labels == c].mean(axis=0) for c in range(CLASSES)]
  )
  distance = np.abs(np.asarray(result.features[1]) - means[LABELS]).mean(axis=(1, 2))
  assert distance[1] < 1e-5 < distance[0] < distance[2]


@pytest.mark.parametrize("name", ALL)
def test_only_denoisers_are_trained(made, runs, mesh, tmp_path, name):
  folder = tmp_path / name
  if name in TRAINED:
    with pytest.raises(WorkdirError, match=r"Cannot read .*result\.npz"):
      generators.make(name, SETTINGS, runs, support.make_run(mesh, SEEDS, 4), folder, MADE, (1.0,))
  else:
    generators.train(name, SETTINGS, runs, support.make_run(mesh, SEEDS, 4), folder, name)
    assert not folder.exists()


@pytest.mark.parametrize(("share", "steps"), [(1.0, 4), (0.5, 2), (0.01, 1), (2.5, 10)])
def test_a_share_of_the_published_steps_trains_ldmlr(runs, mesh, share, steps):
  settings = dataclasses.replace(
    SETTINGS, generators=dataclasses.replace(CONFIG, ldmlr_share=share)
  )
  for name in ldmlr.ROWS:
    assert settings.generator(name).stage(runs, mesh).num_steps == steps
  assert settings.generator("memdiff").stage(runs, mesh).num_steps == 4


def test_class_only_ignores_the_bank_and_memdiff_does_not(made, runs, mesh, workdir, tmp_path):
  """While training, and while sampling."""
  other = make_runs(mesh, (0, 1, 0), bank_from=(2, 3, 4))
  assert np.abs(np.asarray(other.bank.slots - runs.bank.slots)).max() > 0.1
  anew = train_and_make("class_only", other, mesh, tmp_path)
  np.testing.assert_array_equal(anew.features, made("class_only").features)
  learned = made("memdiff").features
  anew = train_and_make("memdiff", other, mesh, workdir)  # is trained already
  differ = np.abs(np.asarray(anew.features - learned)).max(axis=-1)
  assert (differ > 1e-4).mean() > 0.9


def test_what_is_known_of_classes_reaches_the_generator_that_asks_for_it(
  made, runs, mesh, workdir, tmp_path
):
  """While training, and while sampling."""
  other = feature_space.with_class_embeddings(runs, KNOWN[::-1], mesh)
  for name in ("memdiff", "class_only"):
    anew = train_and_make(name, other, mesh, tmp_path)
    np.testing.assert_array_equal(anew.features, made(name).features)
  learned = made("memdiff_described").features
  for folder in (tmp_path, workdir):  # in which it is trained already
    anew = train_and_make("memdiff_described", other, mesh, folder)
    differ = np.abs(np.asarray(anew.features - learned)).max(axis=-1)
    assert (differ > 1e-5).mean() > 0.9


def test_runs_are_sampled_one_by_one_as_together(made, runs, mesh, workdir, monkeypatch):
  together = made("memdiff")
  generators.sampling_program.cache_clear()
  monkeypatch.setattr(memory_diffusion, "_TOGETHER", 0)
  alone = train_and_make("memdiff", runs, mesh, workdir)  # is trained already
  generators.sampling_program.cache_clear()
  for name in ("features", "confidence"):
    expected = np.asarray(getattr(together, name))
    np.testing.assert_allclose(getattr(alone, name), expected, rtol=1e-3, atol=1e-3)


def test_guidance_of_memdiff_is_that_of_each_scale_alone(made, runs, mesh, workdir):
  """A single scale of 1 runs without the pair, and from the same noise."""
  features = np.asarray(made("memdiff").features)
  for k, scale in enumerate((1.0, 2.0)):
    sampling = dataclasses.replace(SETTINGS.hallucination, guidance=(scale,))
    settings = dataclasses.replace(SETTINGS, hallucination=sampling)
    alone = train_and_make("memdiff", runs, mesh, workdir, settings=settings)  # is trained already
    assert alone.features.shape[1] == 1
    np.testing.assert_allclose(alone.features[:, 0], features[:, k], rtol=1e-3, atol=1e-3)
  assert np.abs(features[:, 0] - features[:, 1]).max() > 1e-2


def test_memdiff_may_begin_at_exemplars(runs, mesh, workdir):
  """With little noise features stay near exemplars of their class, with all of it they do not."""
  sampling = dataclasses.replace(SETTINGS.hallucination, guidance=(1.0,), start=(0.01, 1.0))
  settings = dataclasses.replace(SETTINGS, hallucination=sampling)
  result = train_and_make("memdiff", runs, mesh, workdir, settings=settings)
  for r in range(len(SEEDS)):
    own, own_labels = (np.asarray(x[r]) for x in (runs.exemplars.features, runs.exemplars.labels))
    distance = np.linalg.norm(result.features[r][:, :, None] - own[None, None], axis=-1)
    other = np.asarray(result.labels)[:, None] != own_labels[None]
    nearest = np.where(other[None], np.inf, distance).min(axis=-1).mean(axis=-1)
    assert nearest[0] < 0.5 * nearest[1]


# --- fasa ------------------------------------------------------------------------------------


def test_trust_of_fasa_multiplies_the_confidence(runs, mesh, tmp_path, monkeypatch):
  trust = np.array([0.9, 0.5, 1.0, 0.25], np.float32)
  monkeypatch.setattr(fasa, "class_weights", lambda adapted: jnp.asarray(trust))
  settings = dataclasses.replace(SETTINGS, generators=dataclasses.replace(CONFIG, ldmlr_share=7.0))
  result = train_and_make("fasa", runs, mesh, tmp_path, settings=settings)
  judge = judge_by(CONFIG.confidence)
  for run in range(3):
    exemplars, head = jax.tree.map(lambda leaf, run=run: leaf[run], (runs.exemplars, runs.head))
    expected = judge(result.features[run, 0], jnp.asarray(LABELS), exemplars, head)
    np.testing.assert_allclose(
      result.confidence[run, 0], trust[LABELS] * np.asarray(expected), rtol=1e-4, atol=1e-6
    )


def test_fasa_trusts_rare_classes_most(made, runs):
  """Its probabilities start at 1 / n, and four epochs move them by less than they lie apart."""
  judge = judge_by(CONFIG.confidence)
  exemplars, head = jax.tree.map(lambda leaf: leaf[0], (runs.exemplars, runs.head))
  plain = np.asarray(judge(made("fasa").features[0, 0], jnp.asarray(LABELS), exemplars, head))
  trust = np.asarray(made("fasa").confidence[0, 0])[plain > 0] / plain[plain > 0]
  labels = LABELS[plain > 0]
  of_class = [trust[labels == c] for c in (1, 2, 3)]
  for own in of_class:
    np.testing.assert_allclose(own, own[0], rtol=1e-3)
  assert of_class[0][0] < of_class[1][0] < of_class[2][0] <= 1 + 1e-5


def test_fasa_holds_out_a_fifth_of_each_class_but_never_its_last(mesh):
  runs = make_runs(mesh, (0, 1))
  labels = np.array(runs.exemplars.labels)
  labels[1, np.flatnonzero(labels[1] == 3)[:1]] = CLASSES  # padding, and a class of one
  labels[1, np.flatnonzero(labels[1] == 0)[:4]] = CLASSES
  runs = runs.replace(exemplars=runs.exemplars.replace(labels=jnp.asarray(labels)))
  train, held_out, groups = fasa._split(runs)
  for run in range(2):
    real = labels[run] < CLASSES
    parts = np.stack([train.labels[run], held_out.labels[run]])
    assert ((parts < CLASSES).sum(axis=0) == real).all()  # each in one part, padding in none
    assert (parts.min(axis=0) == labels[run]).all()
    counts = np.bincount(labels[run], minlength=CLASSES)[:CLASSES]
    for own, part in ((train, 0), (held_out, 1)):
      found = np.bincount(parts[part], minlength=CLASSES)[:CLASSES]
      np.testing.assert_array_equal(own.by_class.counts[run], found)
    assert (train.by_class.counts[run][counts > 0] >= 1).all()
    assert (np.abs(held_out.by_class.counts[run] - counts / 5) < 1).all()
    assert held_out.by_class.counts[run].sum() >= real.sum() // 5 - 1
  assert groups.shape == (2, CLASSES)
