"""Joint training: rounds, a step with synthetic features, whole runs with refreshes and resume."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_lt
from input_pipeline import dataset as dataset_lib
from memdiff import config as config_lib
from memdiff import pipeline
from memdiff.classifier import backbones
from memdiff.classifier.added import Pool
from memdiff.errors import ConfigError
from memdiff.experiments import joint
from memdiff.experiments.feature_settings import MemdiffConfig
from memdiff.experiments.methods import synthesis_settings
from memdiff.synthesis import image_pool
from tests import support
from tests.support import normal

# --- rounds ----------------------------------------------------------------------------------


def test_rounds_share_the_steps():
  config = SimpleNamespace(num_rounds=4)
  assert joint.round_limits(config, 30) == [0, 8, 15, 22, 30]
  assert joint.round_limits(config, 1000) == [0, 250, 500, 750, 1000]


# --- a step ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def small():
  """A network of one block."""
  network = backbones.BACKBONES["resnet8"]
  backbones.BACKBONES["resnet8"] = backbones.Architecture((1,), (8,), for_small_images=True)
  yield
  backbones.BACKBONES["resnet8"] = network


def settings_of(**changes):
  config = digits_lt.get_config("smoke")
  flat = {
    "classifier.optimizer.warmup": 0.0,
    "selection.folds": 0, "selection.encoder": "frozen", "generators.names": ("kernel_jitter",),
    "head.losses": ("cross_entropy",), "head.training.num_steps": 10,
    "joint.generators": ("real", "kernel_jitter"), "joint.loss": "csl",
    "classifier.batch_size": 32, "classifier.num_epochs": 2.85,
  }  # fmt: skip
  with config.unlocked():
    config.update_from_flattened_dict(flat | changes)
  return config.to_dict()


@pytest.fixture(scope="module")
def experiment(mesh):
  settings = config_lib.build(MemdiffConfig, settings_of())
  data = dataset_lib.load(settings.dataset)
  return SimpleNamespace(config=settings, dataset=data, mesh=mesh, seeds=settings.seeds)


def one_step(experiment, loss, pool, change=lambda state: state):
  """The parameters after one step in the second round, its loss, and the parameters before."""
  config = dataclasses.replace(
    experiment.config, joint=dataclasses.replace(experiment.config.joint, loss=loss)
  )
  e = SimpleNamespace(**vars(experiment) | {"config": config})
  stage = joint.make_stage(e, "j", 7, 14, None, None)
  own = {"start": None, "pool": pool}
  state = jax.jit(stage.init)(jax.random.key(0), own)
  state = change(state.replace(step=jnp.asarray(10, jnp.int32)))
  after, metrics = jax.jit(stage.step)(state, stage.shared, own)
  return after.params, float(metrics["loss"]), state.params


def make_pool(confidence=1.0, features=None, prototype=None):
  """Six features of classes 8 and 9; the moving means of an untrained bank are zero."""
  labels = jnp.array([8, 8, 8, 9, 9, 9], jnp.int32)
  features = np.abs(normal(3, 6, 8)) + 1 if features is None else features
  prototype = np.zeros((10, 8), np.float32) if prototype is None else prototype
  return Pool(
    jnp.asarray(features), jnp.full(6, confidence), labels, jnp.asarray(prototype, jnp.float32)
  )


def test_no_gradient_reaches_the_encoder_from_synthetic_features(experiment):
  with_pool, loss, _ = one_step(experiment, "cross_entropy", make_pool())
  without, plain, before = one_step(experiment, "cross_entropy", None)
  assert loss != plain
  encoder = [{k: v for k, v in p.items() if k != "head"} for p in (with_pool, without, before)]
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), encoder[0], encoder[1])
  changed = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), encoder[1], encoder[2])
  assert max(jax.tree.leaves(changed)) > 0
  assert np.abs(with_pool["head"]["kernel"] - without["head"]["kernel"]).max() > 0


def test_a_synthetic_feature_counts_as_an_image_as_far_as_it_is_trusted(experiment):
  """With logits of zero every row costs log C, times its weight."""

  def flat_head(state):
    head = jax.tree.map(jnp.zeros_like, state.params["head"])
    return state.replace(params=state.params | {"head": head})

  config, images = experiment.config, len(experiment.dataset.train_labels)
  rows = joint.recipe(experiment).added
  weight = rows.weight(10, config.classifier.num_steps(images))
  assert 0 < weight < 1
  for confidence in (1.0, 0.25, 0.0):
    _, loss, _ = one_step(experiment, "cross_entropy", make_pool(confidence), flat_head)
    expected = np.log(10) * (1 + float(weight) * confidence * 6 / images)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_synthetic_features_move_with_their_class(experiment):
  shift = np.zeros((10, 8), np.float32)
  shift[8], shift[9] = 0.5, -0.25
  features = np.abs(normal(3, 6, 8)) + 1
  rows = np.array([8, 8, 8, 9, 9, 9])
  losses = [
    one_step(experiment, "cross_entropy", pool)[1]
    for pool in (
      make_pool(features=features, prototype=-shift),
      make_pool(features=features + shift[rows]),
      make_pool(features=features),
    )
  ]
  assert losses[0] == pytest.approx(losses[1], rel=1e-5) and abs(losses[0] - losses[2]) > 1e-4


def test_generated_images_and_synthetic_features_stand_beside_real_images(experiment, tmp_path):
  """32 real images, 16 generated ones, and features: the bank follows the real ones alone."""
  data, path = experiment.dataset, tmp_path / "images.npz"
  unseen = data.left_out_images[:40], data.left_out_labels[:40]
  image_pool.write(path, *unseen, data.class_names)
  changes = {"images": str(path), "images_share": 0.5, "loss": "cross_entropy"}
  config = dataclasses.replace(
    experiment.config, joint=dataclasses.replace(experiment.config.joint, **changes)
  )
  assert config.input_files == {"generated images": str(path)}
  e = SimpleNamespace(**vars(experiment) | {"config": config})
  stage = joint.make_stage(e, "j", 7, 14, None, None)
  own = {"start": None, "images": jax.tree.map(lambda x: x[0], stage.per_seed["images"])}
  state = jax.jit(stage.init)(jax.random.key(0), own).replace(step=jnp.asarray(10, jnp.int32))
  rows = jax.jit(stage.batch)(state, stage.shared, own | {"pool": None}).rows
  assert np.asarray(rows.real).tolist() == [True] * 32 + [False] * 16
  assert {*np.asarray(rows.labels)[32:]} <= {*unseen[1].tolist()}
  found = {}
  for name, pool in (("images", None), ("both", make_pool())):
    after, metrics = jax.jit(stage.step)(state, stage.shared, own | {"pool": pool})
    assert float(metrics["generated"]) == pytest.approx(1 / 3)
    assert int(np.asarray(after.bank.seen)[: data.num_classes].sum()) == 32
    found[name] = float(metrics["loss"])
  assert found["both"] > found["images"]


def test_every_refresh_draws_anew(experiment, mesh, tmp_path):
  """Of encoders that have not moved, the features of two rounds still differ."""
  run = support.make_run(mesh, experiment.seeds, 5)
  workdir = SimpleNamespace(folder=lambda name: tmp_path / name)
  e = SimpleNamespace(**vars(experiment), run=run, workdir=workdir)
  stage = joint.make_stage(e, "j", 0, 7, None, None)
  state = jax.vmap(lambda key: stage.init(key, {"start": None, "pool": None}))(run.keys("test"))
  settings = synthesis_settings(e)
  pools = [joint.make_pool(e, settings, "kernel_jitter", state, number) for number in (1, 2, 1)]
  np.testing.assert_array_equal(pools[0].features, pools[2].features)
  differ = (np.asarray(pools[0].features) != np.asarray(pools[1].features)).any(axis=-1)
  assert differ.mean() > 0.3
  np.testing.assert_array_equal(pools[0].labels, pools[1].labels)


# --- whole runs ------------------------------------------------------------------------------


def run(workdir, **changes):
  pipeline.run(settings_of(**changes), str(workdir), tensorboard=False, command="test")
  return json.loads((workdir / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("joint") / "run"
  return workdir, run(workdir, **{"joint.refresh_drift": 0.0})


@pytest.mark.slow
def test_the_report_has_the_control_and_the_paired_gain(finished):
  workdir, report = finished
  rows = {row["method"]: row for row in report["classification"]}
  control, method = "joint:real+csl", "joint:kernel_jitter+csl"
  assert set(rows) >= {control, method} and report["joint"][0]["method"] == method
  gain = rows[method]["balanced_accuracy"]["mean"] - rows[control]["balanced_accuracy"]["mean"]
  np.testing.assert_allclose(report["joint"][0]["gain"]["mean"], gain, atol=1e-12)
  with np.load(workdir / "joint" / "logits.npz") as logits:
    labels = dataset_lib.load(config_lib.build(MemdiffConfig, settings_of()).dataset).test_labels
    hits = (logits["kernel_jitter"].argmax(axis=-1) == labels).mean()
  np.testing.assert_allclose(rows[method]["top1"]["mean"], hits)


@pytest.mark.slow
def test_classifiers_of_every_method_predict_what_the_report_says(finished):
  workdir, report = finished
  data = dataset_lib.load(config_lib.build(MemdiffConfig, settings_of()).dataset)
  methods = [row["method"] for row in report["classification"]]
  assert {"own_head", "own_head+logit_adjustment", "joint:real+csl"} < set(methods)
  support.check_that_predictions_are_those_of_the_report(
    workdir, data.test_images, data.test_labels, methods
  )


@pytest.mark.slow
def test_features_are_made_anew_where_the_encoder_has_moved(finished, tmp_path):
  workdir, _ = finished
  made = json.loads((workdir / "joint" / "manifest.json").read_text())["metrics"]["kernel_jitter"]
  assert made["made"] == 3 and len(made["drift"]) == 2 and min(made["drift"]) > 0
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / "joint")
  shutil.rmtree(copy / "evaluation")
  run(copy, **{"joint.refresh_drift": 1e9})
  still = json.loads((copy / "joint" / "manifest.json").read_text())["metrics"]["kernel_jitter"]
  assert still["made"] == 1
  assert still["drift"][0] == pytest.approx(made["drift"][0], rel=1e-4)  # alike up to there


@pytest.mark.slow
def test_a_run_that_lost_its_last_round_ends_with_the_same_logits(finished, tmp_path):
  workdir, report = finished
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  for lost in ("joint/manifest.json", "joint/logits.npz"):
    (copy / lost).unlink()
  for lost in ("joint/kernel_jitter/round_3", "joint/real/round_2", "evaluation"):
    shutil.rmtree(copy / lost)
  again = run(copy, **{"joint.refresh_drift": 0.0})
  assert again["classification"] == report["classification"]


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"classifier.num_epochs": 0.0, "encoder.init_from": __file__}, "num_epochs is 0"),
    ({"classifier.augment.mixup": 0.2}, "mixup is not 0"),
    ({"encoder.backbone.taps": ("1:1",), "head.training.start": "zeros"}, "taps are features"),
    ({"encoder.backbone.head": "cosine"}, "head is cosine"),
  ],
)
def test_what_does_not_go_together_is_refused(changes, words):
  settings = config_lib.build(MemdiffConfig, settings_of(**changes))
  with pytest.raises(ConfigError, match=words):
    joint.check(settings, SimpleNamespace(streamed=False))
  off = dataclasses.replace(settings.joint, generators=())
  joint.check(dataclasses.replace(settings, joint=off), SimpleNamespace(streamed=False))


def test_streamed_sets_are_refused():
  settings = config_lib.build(MemdiffConfig, settings_of())
  with pytest.raises(ConfigError, match="streamed from disk"):
    joint.check(settings, SimpleNamespace(streamed=True))
