"""The evaluation of generated images: metrics, tables, figures."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from input_pipeline.dataset import LongTailDataset, uncut
from memdiff.evaluation import clip_score, image_quality, images, networks, scores
from memdiff.evaluation.image_quality import Labelled
from memdiff.evaluation.image_sets import ImageSet
from memdiff.experiments import bottlenecks, image_figures, prompting, record, summaries
from memdiff.experiments.base import Experiment, forward_images
from memdiff.experiments.image_settings import CLASSIFIER
from memdiff.experiments.image_store import read_drawn, sample_folder
from memdiff.runtime import results
from memdiff.synthesis import image_methods
from memdiff.synthesis.text_to_image import prompts


def judge(experiment: Experiment) -> Experiment:
  """The experiment of the classifier that judges: all real images, the first seed alone."""
  run = dataclasses.replace(experiment.run, seeds=experiment.seeds[:1])
  return dataclasses.replace(experiment, dataset=uncut(experiment.dataset), run=run)


@dataclasses.dataclass(frozen=True)
class Network:
  """What judges images.

  Attributes:
    name: for the metrics.
    description: for people.
    encode: uint8 images [N, H, W, ch] -> (features [N, D], predicted classes [N] or None).
  """

  name: str
  description: str
  encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


def network_of(experiment: Experiment) -> Network:
  config = experiment.config
  if config.evaluation.network == CLASSIFIER:
    judging = judge(experiment)
    loss, data = config.classifier.loss, judging.dataset
    state = results.load(experiment.workdir.folder("network"), experiment.mesh)

    def classify(rows):
      logits, features = forward_images(judging, loss, state, rows)
      return features[0], logits[0].argmax(axis=-1)

    accuracy = float(np.mean(classify(data.test_images)[1] == data.test_labels))
    words = (
      f"a {config.encoder.backbone.name} trained on all {len(data.train_labels):,} real training"
      f" images; {100 * accuracy:.1f} % accuracy on the test set"
    )
    return Network(CLASSIFIER, words, classify)
  name = config.evaluation.network
  side = networks.checked_side(name, config.evaluation.side, "config.evaluation.side")
  network, _ = networks.make_network(name, config.evaluation.weights)

  def encode(rows):
    return images.encode(ImageSet("images of the run", rows), network, side), None

  return Network(name, f"{name}; images: {networks.describe_resize(name, side)}", encode)


def _reference(experiment: Experiment) -> tuple[np.ndarray, np.ndarray]:
  """(images, labels) that generated ones are held against."""
  data = experiment.dataset
  if experiment.config.evaluation.reference == "test":
    return data.test_images, data.test_labels
  whole = uncut(data)
  return whole.train_images, whole.train_labels


def _unseen_distance(data: LongTailDataset) -> float:
  """Mean distance in pixels from real images that training has not seen to the nearest it has."""
  return float(image_quality.nearest(data.test_images, data.train_images).distance.mean())


class _Judging:
  """All that one set of generated images after the other is held against."""

  def __init__(self, experiment: Experiment):
    data = experiment.dataset
    self._experiment, self._data = experiment, data
    self.network = network_of(experiment)
    self.groups = scores.make_groups(data.train_counts)
    rows, labels = _reference(experiment)
    self.real = Labelled(self.network.encode(rows)[0], labels)
    self._unseen = _unseen_distance(data)
    self._clip = None
    if path := experiment.config.evaluation.clip:
      self._clip = clip_score.load(path)
    self._captions = None
    self.caption_of_real = None  # share of test images that lie nearest to their own caption
    if prompting.reads_text(experiment.config):
      train = self.network.encode(data.train_images)[0]
      self._captions = prompting.learn_captions(experiment, train)
      if data.test_captions and any(data.test_captions):
        said = np.array([bool(caption) for caption in data.test_captions])
        features = self.network.encode(data.test_images[said])[0]
        texts = np.array(data.test_captions)[said]
        self.caption_of_real = float(self._captions.hits(features, texts).mean())

  def judge(self, method: str, scale: float, seed: int) -> dict[str, np.ndarray | float]:
    """The metrics of one set."""
    config, data = self._experiment.config.evaluation, self._data
    folder = sample_folder(self._experiment, method, scale, seed)
    drawn = read_drawn(folder)
    rows, labels = drawn["images"], drawn["labels"]
    features, predicted = self.network.encode(rows)
    generated = Labelled(features, labels)
    found = image_quality.compare_sets(
      self.real.features, features, kid_size=config.kid_size, k=config.neighbours, seed=0
    )
    found |= image_quality.by_group(self.real, generated, self.groups)
    per_class = image_quality.by_class(self.real, generated, data.num_classes)
    near = image_quality.nearest(rows, data.train_images)
    found["copied"] = float(near.copied.mean())
    found["nearness"] = float(near.distance.mean() / max(self._unseen, 1e-9))
    shares = {"copied": near.copied}
    if self._clip is not None:
      shares["clip"] = self._clip.score(rows, self._said_of(drawn))
      found["clip"] = float(shares["clip"].mean())
    if "prompt" in drawn:
      shares["caption"] = self._captions.hits(features, drawn["prompt"])
      found["caption"] = float(shares["caption"].mean())
    if predicted is not None:
      shares["right"] = predicted == labels
      found["right"] = float(shares["right"].mean())
    for group in self.groups:
      members = np.isin(labels, group.classes)
      found |= {
        f"{name}_{group.name}": float(hits[members].mean()) if members.any() else np.nan
        for name, hits in shares.items()
      }
    spread = per_class["diversity"]
    known = spread[~np.isnan(spread)]  # none if there is one image of each class
    found["diversity"] = float(known.mean()) if len(known) else np.nan
    found |= {f"per_class_{name}": values for name, values in per_class.items()}
    for name, hits in shares.items():
      found[f"per_class_{name}"] = np.array(
        [hits[labels == c].mean() for c in range(data.num_classes)]
      )
    return found

  def _said_of(self, drawn: Mapping[str, np.ndarray]) -> list[str]:
    """The prompt of each image; of a method that has none, the name of its class."""
    if "prompt" in drawn:
      return drawn["prompt"].tolist()
    names = [prompts.words_of(name) for name in self._data.class_names]
    return [names[c] for c in drawn["labels"]]


def _rows(judging: _Judging, experiment: Experiment, method: str) -> Iterator[dict]:
  """A row of the table per guidance scale; bottlenecks do not depend on it."""
  seeds = range(len(experiment.seeds))
  cosines = [bottlenecks.cosines(experiment, method, seed) for seed in seeds]
  for scale in experiment.config.sampling.guidance:
    experiment.run.progress.say(f"judging {method} at guidance {scale:g}")
    found = [judging.judge(method, scale, seed) | cosines[seed] for seed in seeds]
    yield _row(experiment, method, scale, found)


def _row(experiment: Experiment, method: str, scale: float, found: Sequence[dict]) -> dict:
  """Mean and deviation over seeds of every metric, and the single values."""
  row = {
    "method": method,
    "description": image_methods.describe(method),
    "scale": scale,
    "seeds": list(experiment.seeds),
  }
  for name in found[0]:
    values = np.array([metrics[name] for metrics in found])
    row[name] = scores.mean_std(values)
    if values.ndim == 1:
      row[name]["values"] = scores.plain(values)
  return row


def evaluate(experiment: Experiment) -> dict:
  """Judges every method at every guidance scale, and draws."""
  config, judging = experiment.config, _Judging(experiment)
  rows = [row for method in config.methods for row in _rows(judging, experiment, method)]
  first = [row for row in rows if row["scale"] == config.sampling.guidance[0]]
  result = record.record(experiment, []) | {
    "images": {
      "network": judging.network.name,
      "network_description": judging.network.description,
      "reference": config.evaluation.reference,
      "reference_number": len(judging.real.labels),
      "image_shape": list(experiment.dataset.train_images.shape[1:]),
      "caption_of_real": judging.caption_of_real,
      "generated_number": config.sampling.per_class * experiment.dataset.num_classes,
      "rows": first,
      "sweep": rows if len(config.sampling.guidance) > 1 else [],
    }
  }
  record.save(experiment, result, image_figures.draw(experiment, result), summaries.write_images)
  return {row["method"]: row["fd"] for row in first}
