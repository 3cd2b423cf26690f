"""What a contributor adds, each as docs/extending.md says, goes through a whole run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_lt
from memdiff import pipeline
from memdiff.classifier import losses
from memdiff.classifier.losses import Loss
from memdiff.diffusion import terms
from memdiff.diffusion.terms import Term
from memdiff.evaluation import scores
from memdiff.evaluation.scores import Metric
from memdiff.memory import exemplars as exemplars_lib
from memdiff.synthesis import generators
from memdiff.synthesis.generators import Row
from memdiff.synthesis.untrained import Untrained
from tests import support


def towards_the_mean(key, exemplars, fitted, labels, strength):
  """Exemplars drawn towards the mean of their class by `strength`."""
  del fitted
  means = exemplars_lib.class_means(exemplars)[labels]
  return means + (1 - strength) * (exemplars_lib.draw(key, exemplars, labels) - means)


def smoothness(config, prediction):
  """A small weight on the square of the bottleneck."""
  del config
  return 1e-3 * jnp.square(prediction.bottleneck).mean()


def worst_class(predictions, labels, num_classes):
  """Accuracy of the class that is recognised least."""
  hits = predictions == labels
  present = [c for c in range(num_classes) if (labels == c).any()]
  return np.min([hits[:, labels == c].mean(axis=1) for c in present], axis=0)


@pytest.fixture(scope="module", params=support.SLOW)
def report(tmp_path_factory):
  folder = tmp_path_factory.mktemp("additions") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(
      generators.GENERATORS,
      "towards_the_mean",
      Row("exemplars drawn to their mean", lambda _: Untrained(towards_the_mean, (0.0, 0.5))),
    )
    patch.setitem(
      losses.OBJECTIVES,
      "squared_cross_entropy",
      lambda z, y, n, s, config: jnp.square(losses.cross_entropy(z, y)),
    )
    patch.setitem(losses.LOSSES, "squared", Loss("squared cross-entropy", "squared_cross_entropy"))
    patch.setitem(terms.TERMS, "smoothness", Term(lambda config: True, smoothness))
    patch.setitem(scores.METRICS, "worst_class", Metric("worst class", worst_class))
    config = digits_lt.get_config("smoke")
    config.seeds, config.head.losses = (0,), ("csl",)
    config.classifier.loss = "squared"
    config.generators.names = ("towards_the_mean", "memdiff")
    yield folder, pipeline.run(config.to_dict(), str(folder), tensorboard=False, command="test")
  jax.clear_caches()  # programs with the terms above


def test_a_generator_is_scored_like_all_others(report):
  rows = {row["method"]: row for row in report[1]["classification"]}
  assert "exemplars drawn to their mean" in rows["towards_the_mean+csl"]["description"]
  assert report[1]["generators"]["towards_the_mean"]["diversity"]["mean"] > 0
  assert report[1]["choices"]["towards_the_mean+csl"]["strength"] in (0.0, 0.5)


def test_a_loss_trains_the_classifier(report):
  rows = {row["method"]: row for row in report[1]["classification"]}
  assert "squared cross-entropy" in rows["own_head"]["description"]
  assert (report[0] / "classifier" / "squared" / "result.npz").exists()


def test_a_term_of_the_objective_has_its_curve(report):
  curve = (report[0] / "diffusion" / "memdiff" / "metrics.jsonl").read_text(encoding="utf-8")
  assert '"smoothness"' in curve and '"mse"' in curve


def test_a_metric_has_its_column_in_every_table(report):
  folder, written = report
  for row in written["classification"]:
    assert 0 <= row["worst_class"]["mean"] <= min(row["per_class_top1"]["mean"]) + 1e-9
  assert "worst class" in (folder / "report.html").read_text(encoding="utf-8")
