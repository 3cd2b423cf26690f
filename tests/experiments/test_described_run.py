"""A run on embeddings whose classes are described: rows with what is known of them."""

import numpy as np
import pytest

from configs import features
from memdiff import pipeline
from memdiff.errors import MemdiffError
from memdiff.evaluation import answer
from memdiff.experiments.fitted import Fitted
from tests import support

CLASSES, DIM, NAMES = 12, 6, [f"class {c}" for c in range(12)]
ROWS = ("real+class_knowledge", "real+zero_shot", "memdiff_described+cross_entropy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """data.npz, whose classes lie where known.npz lets expect."""
  folder, rng = tmp_path_factory.mktemp("described"), np.random.default_rng(0)
  known = rng.normal(size=(CLASSES, 3))
  means = 2 * known @ rng.normal(size=(3, DIM))

  def draw(counts):
    labels = np.repeat(np.arange(CLASSES), counts)
    return (means[labels] + rng.normal(size=(len(labels), DIM))).astype(np.float32), labels

  names = ("features", "labels", "test_features", "test_labels")
  arrays = *draw(np.where(np.arange(CLASSES) < 6, 30, 4)), *draw(np.full(CLASSES, 20))
  np.savez(folder / "data.npz", class_names=NAMES, **dict(zip(names, arrays, strict=True)))
  np.savez(folder / "known.npz", names=NAMES[::-1], embeddings=known[::-1])
  np.savez(folder / "others.npz", names=NAMES[1:], embeddings=known[1:])
  return folder


def config_for(folder, known="known.npz"):
  config = features.get_config()
  config.seeds = (0, 1)
  config.dataset.train_path = str(folder / "data.npz")
  config.class_embeddings = str(folder / known)
  config.generators.update(names=("duplicate", "memdiff_described"), fill_to=(10,))
  config.diffusion.update(num_steps=20, batch_size=16)
  config.diffusion.denoiser.update(width=16, num_blocks=1, embedding_dim=8, num_heads=1)
  config.hallucination.num_steps = 4
  config.head.update(losses=("cross_entropy",), exponents=(1.0,), l2=(1e-3,), fitted=("plda",))
  config.head.training.update(num_steps=20, batch_size=16)
  config.selection.folds = 2
  config.loop.steps_per_dispatch = 10
  return config


def first_words(report, worth):
  """Of a report in which the blend with what is known of the classes is worth that."""
  advice = report["recommendation"]
  scores = advice["scores"] | {"real+class_knowledge": {"in_blend": worth}}
  return answer.answer(report | {"recommendation": advice | {"scores": scores}}).lines()[0]


@pytest.fixture(scope="module", params=support.SLOW)
def finished(folder):
  config = config_for(folder).to_dict()
  return pipeline.run(config, str(folder / "run"), tensorboard=False, command="")


def test_the_first_words_say_whether_it_is_used(finished):
  worth = finished["recommendation"]["scores"]["real+class_knowledge"]["in_blend"]
  low, high = worth["interval"]
  assert low <= worth["gain"] <= high and worth["used"] == (low > 0)
  worth = {"score": 0.5, "gain": 0.01, "interval": [-0.01, 0.03], "used": False}
  said = first_words(finished, worth)
  assert (
    "Embeddings of the classes are not used, since they bring no clear gain: in cross-validation"
    " they change the blend's score by +1.0 points, 95 % interval −1.0 to +3.0." in said
  )
  nothing = first_words(finished, worth | {"gain": 0.0, "interval": [0.0, 0.0]})
  assert "are not used: in cross-validation they change nothing." in nothing
  used = first_words(finished, worth | {"interval": [0.002, 0.018], "used": True})
  assert "Embeddings of the classes are used: in cross-validation they" in used


def test_what_is_known_makes_rows(finished):
  rows = {row["method"]: row for row in finished["classification"]}
  assert set(ROWS) < set(rows)
  assert rows["real+zero_shot"]["few"]["mean"] > 2 / CLASSES  # without an example of a class
  assert "expected from what is known" in rows["real+class_knowledge"]["description"]
  assert "told embeddings of the classes" in rows["memdiff_described+cross_entropy"]["description"]
  weights = finished["fitted"]["weights"]
  assert weights["zero_shot"] == 0 and set(weights) == {"plda", "class_knowledge", "zero_shot"}
  scores = finished["recommendation"]["scores"]
  assert set(ROWS) < set(scores)


@pytest.mark.slow
def test_without_folds_the_blend_does_without_what_is_known(folder, tmp_path):
  config = config_for(folder)
  config.selection.folds = 0
  config.generators.names = ("memdiff",)
  config.head.fitted = ("plda", "lda")
  report = pipeline.run(config.to_dict(), str(tmp_path), tensorboard=False, command="")
  weights = report["fitted"]["weights"]
  assert weights == {"plda": 0.5, "lda": 0.5, "class_knowledge": 0, "zero_shot": 0}
  assert {"real+class_knowledge", "real+zero_shot"} < {
    row["method"] for row in report["classification"]
  }


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"class_embeddings": ""}, "generator memdiff_described is told embeddings of the classes"),
    ({"diffusion.anonymous": 1.0}, "memdiff_described cannot be used: .*description_and_memory"),
    ({"generators.names": ("memdiff",), "head.fitted": ()}, "given, but nothing reads it"),
  ],
)
def test_settings_without_sense_are_refused(folder, tmp_path, changes, words):
  config = config_for(folder)
  config.update_from_flattened_dict(changes)
  with pytest.raises(MemdiffError, match=words):
    pipeline.run(config.to_dict(), str(tmp_path / "run"), tensorboard=False, command="")
  assert not (tmp_path / "run").exists()


def test_a_blend_is_made_of_what_has_a_weight():
  chosen = Fitted({"plda": 0.1, "class_knowledge": 0.1}, {"plda": 1.0, "class_knowledge": 0.0})
  blend = next(m for m in chosen.methods if m.loss == "blend")
  assert chosen.parts(blend) == ["plda"] and "class_knowledge" not in chosen.describe(blend)


def test_every_row_predicts_what_its_report_says(finished, folder):
  data = np.load(folder / "data.npz", allow_pickle=False)
  support.check_that_predictions_are_those_of_the_report(
    folder / "run", data["test_features"], data["test_labels"], [*ROWS, "real+blend"]
  )


@pytest.mark.parametrize(
  ("known", "words"),
  [
    ("others.npz", "config.class_embeddings has none for 1 classes, for example 'class 0'"),
    ("data.npz", "config.class_embeddings is .*data.npz, which cannot be read"),
    ("nothing.npz", "nothing.npz"),
  ],
)
def test_embeddings_that_do_not_fit_the_classes_are_refused(folder, tmp_path, known, words):
  config = config_for(folder, known).to_dict()
  with pytest.raises(MemdiffError, match=words):
    pipeline.run(config, str(tmp_path / "run"), tensorboard=False, command="")
  assert not (tmp_path / "run").exists()
