"""Two small finished runs: on embeddings, whose data are gone, and on images."""

import numpy as np
import pytest

from configs import digits_lt, features
from input_pipeline import dataset
from memdiff import pipeline
from memdiff.classifier import backbones

DIM = 6


def rows_of_classes(rng, counts):
  """Features around a mean of each class, far from 0, and labels in words."""
  means = 100 + 2 * np.random.default_rng(7).normal(size=(len(counts), DIM))
  labels = np.repeat(np.arange(len(counts)), counts)
  names = np.array(["ant", "bee", "cat"])
  return (means[labels] + rng.normal(size=(len(labels), DIM))).astype(np.float32), names[labels]


def flattened(config, **changes):
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config.to_dict()


@pytest.fixture(scope="module")
def of_features(tmp_path_factory):
  """(workdir, test features, test labels) of a run on embeddings whose data are gone."""
  folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
  train, test = rows_of_classes(rng, (40, 12, 4)), rows_of_classes(rng, (30, 30, 30))
  np.savez(folder / "data.npz", features=train[0], labels=train[1], test_features=test[0],
           test_labels=test[1])  # fmt: skip
  config = flattened(
    features.get_config(),
    **{
      "seeds": (0, 3), "dataset.train_path": str(folder / "data.npz"), "selection.folds": 2,
      "generators.names": ("kernel_jitter",), "head.training.num_steps": 40,
      "head.training.batch_size": 32, "head.l2": (1e-3,), "head.exponents": (1.0,),
      "head.taus": (1.0,), "generators.fill_to": (20,), "loop.steps_per_dispatch": 20,
    },
  )  # fmt: skip
  pipeline.run(config, str(folder / "run"), tensorboard=False, command="a test")
  (folder / "data.npz").unlink()
  return folder / "run", *test


@pytest.fixture(scope="module")
def of_images(tmp_path_factory):
  """(workdir, test images, test labels) of a run of classifiers of digits."""
  workdir = tmp_path_factory.mktemp("images") / "run"
  with pytest.MonkeyPatch.context() as patch:
    small = backbones.Architecture((1,), (8,), for_small_images=True)
    patch.setitem(backbones.BACKBONES, "resnet8", small)
    config = flattened(
      digits_lt.get_config("classification"),
      **{
        "seeds": (0, 1), "dataset.holdout": 0.2, "classifier.references": ("ldam_drw",),
        "classifier.batch_size": 32, "classifier.num_epochs": 4.0, "decoupled.num_epochs": 1.0,
        "decoupled.methods": ("logit_adjustment", "tau_norm", "ncm", "crt", "lws"),
        "loop.steps_per_dispatch": 10,
      },
    )  # fmt: skip
    pipeline.run(config, str(workdir), tensorboard=False, command="a test")
    settings = pipeline.settings_of(config)
    data = dataset.load(settings.dataset)
    yield workdir, data.test_images, data.test_labels
