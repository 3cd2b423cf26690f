"""Feature quality of one run: every metric over seeds and classes, with what it means in words.

Metrics that compare all pairs take at most `features.MOST_ROWS` features of a class from each set.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import numpy as np

from memdiff.evaluation import feature_metrics as metrics
from memdiff.evaluation.scores import mean_std, plain

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
    "Squared kernel distance (unbiased) of hallucinated to training features; the bandwidth is the"
    " median distance of unseen real ones.",
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


@dataclasses.dataclass(frozen=True)
class Seed:
  """The standardised features of one seed.

  Attributes:
    train: [N, D].
    left_out: [L, D].
    synthetic: generator -> [M, D].
  """

  train: np.ndarray
  left_out: np.ndarray
  synthetic: Mapping[str, np.ndarray]


class _Set:
  """The features of one class out of one set, and what all metrics share of them."""

  def __init__(self, features: np.ndarray):
    self.all = features
    self.some = metrics.at_most(features)

  @functools.cached_property
  def within(self) -> np.ndarray:
    return metrics.squared_distances(self.some, self.some)

  @functools.cached_property
  def gaussian(self) -> metrics.Gaussian | None:
    return metrics.fit_gaussian(self.all)


class _Truth:
  """The real features of one class and seed, which all generators are held against."""

  def __init__(self, train: np.ndarray, left_out: np.ndarray):
    self.train, self.left_out = _Set(train), _Set(left_out)
    self.diversity = metrics.diversity(self.left_out.within)
    # Of unseen features, whoever is judged; of the training ones if there are none.
    widest = self.left_out if len(left_out) > 1 else self.train
    self.bandwidth = metrics.median_bandwidth(widest.within)
    self.unseen = self._to_train(left_out)

  def _to_train(self, features: np.ndarray) -> np.ndarray:
    """Distances to the nearest training feature; none if there is none."""
    if not len(self.train.all):
      return np.zeros(0)
    return metrics.nearest_distances(features, self.train.all)

  @property
  def is_known(self) -> bool:
    """Whether there are unseen features to hold others against."""
    return len(self.left_out.all) > 1

  def compare(self, other: _Set) -> dict[str, float]:
    """What can be said of training features as well as of synthetic ones, against left-out ones."""
    if not self.is_known:
      return {}
    between = metrics.squared_distances(self.left_out.some, other.some)
    precision, recall = metrics.precision_recall(self.left_out.within, other.within, between)
    diversity = metrics.diversity(other.within)
    return {
      "diversity": diversity / self.diversity if self.diversity else float("nan"),
      "truth_mmd": metrics.mmd(self.left_out.within, other.within, between, self.bandwidth),
      "truth_frechet": metrics.frechet(self.left_out.gaussian, other.gaussian),
      "truth_precision": precision,
      "truth_recall": recall,
    }

  def _mmd_to_train(self, other: _Set) -> float:
    between = metrics.squared_distances(self.train.some, other.some)
    return metrics.mmd(self.train.within, other.within, between, self.bandwidth)

  def reference(self) -> dict[str, float]:
    """What real data reach: training features in the place of synthetic ones."""
    return self.compare(self.train) | {"mmd": self._mmd_to_train(self.left_out)}

  def judge(self, features: np.ndarray) -> tuple[dict[str, float], float]:
    """Metrics of synthetic features [M, D], and the KL's shrinkage."""
    synthetic = _Set(features)
    values = self.compare(synthetic) | {"mmd": self._mmd_to_train(synthetic)}
    if len(self.unseen):
      copied = self._to_train(features)
      values["memorization_ratio"] = metrics.memorization_ratio(copied, self.unseen)
    if not self.is_known:
      return values, float("nan")
    kl, shrinkage = metrics.gaussian_kl(self.left_out.gaussian, synthetic.gaussian)
    return values | {"kl_gaussian": kl}, shrinkage


_REFERENCE_WORDS = {
  "separation": "unseen real features",
  "mmd": "unseen real features against training features",
}


class _Values:
  """A generator's metrics: rows of seeds, [C] each, NaN if there is nothing."""

  def __init__(self, num_classes: int):
    self._num_classes = num_classes
    self.values: list[dict[str, np.ndarray]] = []
    self.references: list[dict[str, np.ndarray]] = []
    self.shrinkages: list[float] = []

  def begin_seed(self) -> None:
    for rows in (self.values, self.references):
      rows.append({name: np.full(self._num_classes, np.nan) for name in _WORDS})

  def report(self) -> dict:
    report, truth = {}, {}
    for name, (meaning, better) in _WORDS.items():
      entry = _over_classes(np.stack([row[name] for row in self.values]))
      entry |= {"meaning": meaning, "better": better}
      reference = _over_classes(np.stack([row[name] for row in self.references]))
      if reference["mean"] is not None:
        label = _REFERENCE_WORDS.get(name, "training features in their place")
        entry["reference"] = {"label": label, "mean": reference["mean"], "std": reference["std"]}
      if name.startswith("truth_"):
        truth[name.removeprefix("truth_")] = entry
      else:
        report[name] = entry
    finite = [s for s in self.shrinkages if np.isfinite(s)]
    report["kl_gaussian"]["shrinkage"] = max(finite) if finite else None
    return report | {"truth_test": truth}


def measure(
  seeds: Iterable[Seed],
  train_labels: np.ndarray,
  left_out_labels: np.ndarray,
  synthetic_labels: Mapping[str, np.ndarray],
  num_classes: int,
) -> dict[str, dict]:
  """All quality metrics of all generators of a run.

  Args:
    seeds: one after the other.
    train_labels, left_out_labels: [n].
    synthetic_labels: generator -> [M].
    num_classes: C.

  Returns:
    generator -> {metric: {mean, std, per_class [C], meaning, better, reference}}, mean and std over
    seeds of the mean over hallucinated classes; `truth_test` holds those against left-out features;
    a class without enough features is None. `kl_gaussian` has `shrinkage`, the largest intensity
    used.
  """
  found = {name: _Values(num_classes) for name in synthetic_labels}
  classes = {name: np.unique(labels) for name, labels in synthetic_labels.items()}
  for seed in seeds:
    for name in found:
      found[name].begin_seed()
    for label in np.unique(np.concatenate(list(classes.values()))):
      truth = _Truth(seed.train[train_labels == label], seed.left_out[left_out_labels == label])
      reference = truth.reference()
      for name, measures in found.items():
        if label not in classes[name]:
          continue
        values, shrinkage = truth.judge(seed.synthetic[name][synthetic_labels[name] == label])
        measures.shrinkages.append(shrinkage)
        for rows, of_class in ((measures.values, values), (measures.references, reference)):
          for metric, value in of_class.items():
            rows[-1][metric][label] = value
    centre = seed.train.mean(axis=0)
    for name, measures in found.items():
      measures.values[-1]["separation"] = metrics.separation(
        seed.synthetic[name], synthetic_labels[name], centre, num_classes
      )
      among = np.isin(left_out_labels, classes[name])
      measures.references[-1]["separation"] = metrics.separation(
        seed.left_out[among], left_out_labels[among], centre, num_classes
      )
  return {name: measures.report() for name, measures in found.items()}


def _over_classes(values: np.ndarray) -> dict:
  """[S, C] with NaN if there is nothing -> mean and std over seeds of the mean over classes."""
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
  1 is as near as real ones are to each other. [M]; NaN if a class has fewer than two unseen.
  """
  distances = np.full(len(labels), np.nan)
  for label in np.unique(labels):
    unseen, of_class = left_out[left_out_labels == label], labels == label
    if len(unseen) < 2:
      continue
    unit = np.median(metrics.nearest_distances(unseen, unseen, itself=False))
    if unit > 0:
      distances[of_class] = metrics.nearest_distances(synthetic[of_class], unseen) / unit
  return distances
