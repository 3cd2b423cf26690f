"""Every config file and every variant that it documents: valid, and a run from end to end."""

import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from PIL import Image

from input_pipeline import dataset, identity
from input_pipeline.lazy_images import LazyImages
from input_pipeline.source import Source
from memdiff import config as config_lib
from memdiff import pipeline
from memdiff.classifier import backbones, encoder
from memdiff.classifier.backbones import Architecture

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "base")
COUNTS = np.array([16, 10, 6, 4])  # of the long tail; the sets have 16 of each class
CLASSES = tuple("abcd")
SIZE = 8
OTHER_DEFAULTS = {"pretrained_cifar": "akamaster_resnet32", "isolating_cifar100_lt": "foreign"}
PRETRAINED = (*OTHER_DEFAULTS, "isolating_cifar10_lt")  # need weights


def module_of(name):
  return importlib.import_module(f"configs.{name}")


def variants_of(name):
  """The variants that the file accepts, as its refusal of another one lists them."""
  with pytest.raises(ValueError, match="unknown variant 'none of them'") as caught:
    module_of(name).get_config("none of them")
  names = re.search(r"the variants are (.*)\.$", str(caught.value))[1].split(", ")
  return [n for n in names if n != "default" or name not in OTHER_DEFAULTS]


ALL = [(name, variant) for name in MODULES for variant in variants_of(name)]
# Those that other files run: test_pipeline.py and test_classification_run.py.
RUN_ELSEWHERE = {("digits_lt", "smoke"), ("digits_lt", "classification")}
# What they run another config runs as well, on other data or in other numbers.
ALIKE = {
  ("cifar10_lt", "memdiff"), ("digits_lt", "full"), ("fashion_mnist_lt", "memdiff"),
  ("isolating_cifar100_lt", "ldmlr"), ("isolating_cifar100_lt", "memorised"),
  ("isolating_cifar10_lt", "default"),
}  # fmt: skip
TO_RUN = [variant for variant in ALL if variant not in RUN_ELSEWHERE | ALIKE]


# --- as they are -----------------------------------------------------------------------------


def test_there_is_a_config_for_every_published_benchmark():
  assert {
    "cifar10_lt",
    "cifar100_lt",
    "fashion_mnist_lt",
    "imagenet_lt",
    "inaturalist2018",
    "food101_lt",
    "digits_lt",
    "folder",
    "pretrained_cifar",
    "features",
  } <= set(MODULES)
  assert len(ALL) >= 20


def settings_of(config):
  return config_lib.build(pipeline.kind_of(config).settings, config)


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_a_config_is_valid(name, variant):
  settings = settings_of(module_of(name).get_config(variant).to_dict())
  assert settings_of(config_lib.as_dict(settings)) == settings


@pytest.mark.parametrize(("name", "variant"), [v for v in ALL if v[0] != "features"])
def test_the_encoder_of_a_config_fits_its_images(name, variant):
  settings = settings_of(module_of(name).get_config(variant).to_dict())
  assert settings.dataset.name in dataset.SOURCES
  side = settings.dataset.image_size or {"digits": 8, "fashion_mnist": 28}.get(
    settings.dataset.name, 32
  )
  channels = 1 if settings.dataset.name in ("digits", "fashion_mnist") else 3
  small = backbones.BACKBONES[settings.encoder.backbone.name].for_small_images
  assert small == (side <= 64)
  for loss in (settings.classifier.loss, *settings.classifier.references):
    model = encoder.make_model(settings.encoder, loss, 10)
    logits, features = jax.eval_shape(
      lambda model=model: model.init_with_output(
        jax.random.key(0), jnp.zeros((2, side, side, channels)), train=False
      )[0]
    )
    assert logits.shape == (2, 10)
    assert features.shape == (2, settings.encoder.feature_dim)


@pytest.mark.parametrize("name", MODULES)
def test_a_file_documents_its_variants_and_its_command(name):
  documentation = module_of(name).__doc__
  if name == "cifar10_lt":
    documentation += module_of("cifar100_lt").__doc__
  assert f"configs/{name}.py" in documentation or name == "cifar10_lt"
  for variant in variants_of(name):
    assert variant in documentation or variant == "default"


def test_the_default_variant_is_what_no_variant_gives():
  for name in MODULES:
    module, default = module_of(name), OTHER_DEFAULTS.get(name, "default")
    assert module.get_config().to_dict() == module.get_config(default).to_dict()


def test_configs_share_no_values_that_change_together():
  """A variant changes its own copy."""
  module = module_of("cifar100_lt")
  before = module.get_config().to_dict()
  module.get_config("proco").classifier.batch_size = 1
  assert module.get_config().to_dict() == before


# --- run, shrunken ---------------------------------------------------------------------------


class Reader:
  """Photographs by number, of different sizes."""

  def __init__(self, images):
    self.images = images

  def __len__(self):
    return len(self.images)

  def __getitem__(self, index):
    edges = ((index % 3, 2), (1, index % 5), (0, 0))
    return Image.fromarray(np.pad(self.images[index], edges, mode="edge"))

  def fingerprint(self, indices):
    return identity.digest(self.images[indices])


def patterns(labels, channels, seed):
  """Noise around a pattern per class, uint8."""
  pattern = np.random.default_rng(5).integers(30, 220, (len(CLASSES), SIZE, SIZE, channels))
  noise = np.random.default_rng(seed).integers(-30, 31, (len(labels), SIZE, SIZE, channels))
  return (pattern[labels] + noise).astype(np.uint8)


def source_of(config):
  """A set in place of the one that `config` names: as many channels, streamed where it is."""
  natural = config.profile == "natural"
  labels = np.repeat(np.arange(4), COUNTS if natural else 16)
  test_labels = np.tile(np.arange(4), 6)
  channels = 1 if config.name in ("digits", "fashion_mnist") else 3
  images, test = patterns(labels, channels, 0), patterns(test_labels, channels, 1)
  names = None
  if config.image_size:
    images, test = (LazyImages(Reader(x), config.image_size) for x in (images, test))
    names = np.array([f"n{label}/image_{i}.JPEG" for i, label in enumerate(labels)])
  return Source(CLASSES, images, labels, test, test_labels, names)


def write_folder(folder):
  """The same set as files."""
  for split, labels, seed in (("train", np.repeat(np.arange(4), COUNTS), 0),
                              ("test", np.tile(np.arange(4), 6), 1)):  # fmt: skip
    for i, (image, label) in enumerate(zip(patterns(labels, 3, seed), labels, strict=True)):
      own = folder / split / CLASSES[label]
      own.mkdir(parents=True, exist_ok=True)
      Image.fromarray(image).save(own / f"{i:03}.png")


def write_embeddings(path):
  """The same numbers of examples as rows of five numbers, with a test set beside them."""
  rng = np.random.default_rng(3)
  labels, test_labels = np.repeat(np.arange(4), COUNTS), np.tile(np.arange(4), 6)
  centres = rng.normal(size=(4, 5)) * 2
  np.savez(
    path,
    features=centres[labels] + rng.normal(size=(len(labels), 5)),
    labels=labels,
    test_features=centres[test_labels] + rng.normal(size=(len(test_labels), 5)),
    test_labels=test_labels,
  )


def write_list(path):
  """The first images of each class: in the format of the official lists, or as indices."""
  kept = [(c, 16 * c + i) for c in range(4) for i in range(COUNTS[c])]
  if path.suffix == ".npz":
    np.savez(path, rows=[number for _, number in kept])
  else:
    path.write_text("\n".join(f"train/n{c}/image_{number}.JPEG {c}" for c, number in kept))


def write_weights(path, config):
  """A state dict for the network of `config`, by PyTorch's names."""
  model = encoder.make_model(
    settings_of(config).encoder, config["classifier"]["loss"], len(CLASSES)
  )
  images = jnp.zeros((1, SIZE, SIZE, 3))
  variables = jax.jit(lambda: model.init(jax.random.key(7), images, train=False))()
  arrays = {}
  for place, leaf in jax.tree_util.tree_leaves_with_path(variables):
    _, *modules, last = (key.key for key in place)
    module = ".".join(modules).replace("_", ".").replace("head", "linear")
    name = {"mean": "running_mean", "var": "running_var", "bias": "bias"}.get(last, "weight")
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(leaf.ndim, (0,))
    arrays[f"module.{module}.{name}"] = np.asarray(leaf).transpose(order)
  np.savez(path, **arrays)


def shrunken(name, variant, folder):
  """The config with everything that costs time made small; what it says otherwise stays."""
  config = module_of(name).get_config(variant)
  config.seeds = (0,)
  config.dataset.imbalance = 4.0
  config.loop.update(steps_per_dispatch=2, eval_every=2, checkpoint_every=2)
  if config.experiment == "features":
    config.dataset.train_path = str(folder / "embeddings.npz")
    write_embeddings(folder / "embeddings.npz")
  else:
    shrink_images(config, folder)
  if config.experiment == "classification":
    config.decoupled.num_epochs = TWO_STEPS
  else:
    config.diffusion.denoiser.update(width=16, num_blocks=1, embedding_dim=8, num_heads=2)
    config.diffusion.num_steps = config.head.training.num_steps = 2
    config.evaluation.map_per_class = 3
    config.hallucination.update(num_steps=2, chunk_size=32)
    config.generators.update(tail_below=16, fill_to=(16,))
    config.generators.fasa.update(num_epochs=1, batch_size=9)
    config.selection.folds = 0 if name in WITHOUT_SELECTION else 2
    config.generators.names = SOME_GENERATORS.get((name, variant), ("memdiff",))
  if name in PRETRAINED:
    config.encoder.init_from = str(folder / "weights.npz")
    write_weights(folder / "weights.npz", config.to_dict())
  return config


TWO_STEPS = 2 * 9 / COUNTS.sum()  # epochs of batches of nine
# These differ from others by their images, or leave selection out.
WITHOUT_SELECTION = (
  "cifar10_lt", "fashion_mnist_lt", "imagenet_lt", "inaturalist2018", "isolating_cifar10_lt"
)  # fmt: skip
SOME_GENERATORS = {  # of those named; tests/synthesis runs each, and each costs seconds here
  ("isolating_cifar100_lt", "foreign"): ("fasa", "memdiff"),
  ("features", "default"): ("gaussian_shrunk", "class_only", "memdiff"),
}


def shrink_images(config, folder):
  """What concerns images alone, and the files that take their place."""
  config.dataset.data_dir = str(folder)
  if config.dataset.image_size:
    config.dataset.image_size = SIZE
  if config.dataset.profile == "list":
    official = config.dataset.list_path  # of a large set; of a small one an array of indices
    config.dataset.list_path = str(folder / (official or "rows.npz"))
    write_list(folder / config.dataset.list_path)
  if config.dataset.name == "folder":
    write_folder(folder)
  classifier = config.classifier
  classifier.augment.padding = min(classifier.augment.padding, 1)
  classifier.augment.cutout = min(classifier.augment.cutout, 2)
  classifier.stream.num_threads = 2
  classifier.batch_size = 9
  classifier.num_epochs = min(classifier.num_epochs, TWO_STEPS)
  if config.experiment == "memdiff":
    config.joint.num_rounds = 2


@pytest.fixture
def _small_parts(monkeypatch):
  """Networks of one convolution in place of those by name, made sets in place of downloads."""
  for name in backbones.BACKBONES:
    monkeypatch.setitem(backbones.BACKBONES, name, Architecture((0, 0, 0), (8, 8, 8), True))
  for name in dataset.SOURCES:
    if name != "folder":
      monkeypatch.setitem(dataset.SOURCES, name, source_of)
  with threadpoolctl.threadpool_limits(1):
    yield


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("variant", ["akamaster_resnet32", "ldmlr_cifar10"])
def test_published_weights_run_on_pixels_as_they_were_trained_on(variant, tmp_path):
  """Logits of the given weights on images in the given order of channels, written out."""
  config = shrunken("pretrained_cifar", variant, tmp_path)
  report = pipeline.run(config.to_dict(), str(tmp_path / "run"), tensorboard=False, command="")
  assert report["num_steps"] == 0
  images = patterns(np.tile(np.arange(4), 6), 3, 1) / 255.0
  if variant == "ldmlr_cifar10":
    images = images[..., ::-1]  # the published statistics are in this order too
  x = (images - np.array(config.encoder.input.mean)) / np.array(config.encoder.input.std)
  with np.load(tmp_path / "weights.npz") as file:
    w = {name.removeprefix("module."): array for name, array in file.items()}
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
  x = np.einsum("bhwikl,oikl->bhwo", windows, w["conv1.weight"])
  x = (x - w["bn1.running_mean"]) / np.sqrt(w["bn1.running_var"] + 1e-5) * w["bn1.weight"]
  features = np.maximum(x + w["bn1.bias"], 0).mean(axis=(1, 2))
  logits = features @ w["linear.weight"].T + w["linear.bias"]
  with np.load(tmp_path / "run" / "features" / "cross_entropy.npz") as file:
    np.testing.assert_allclose(file["logits"][0], logits, rtol=1e-4, atol=1e-4)


# One of every kind of data: arrays, streamed images, a folder, published weights.
QUICK = {("cifar100_lt", "default"), ("imagenet_lt", "resnet10"), ("folder", "default"),
         ("pretrained_cifar", "ldmlr_cifar100")}  # fmt: skip


def in_time(name, variant):
  marks = [] if (name, variant) in QUICK else [pytest.mark.slow]
  return pytest.param(name, variant, marks=marks)


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize(("name", "variant"), sorted(ALIKE))
def test_a_config_that_is_like_another_fits_its_data(name, variant, tmp_path):
  config = shrunken(name, variant, tmp_path)
  _, settings, data = pipeline.prepare(config.to_dict())
  assert settings.name == config.name
  assert data.train_counts.tolist() == COUNTS.tolist()


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize(("name", "variant"), [in_time(*variant) for variant in TO_RUN])
def test_a_config_runs_from_end_to_end(name, variant, tmp_path):
  config = shrunken(name, variant, tmp_path)
  workdir = tmp_path / "run"
  report = pipeline.run(config.to_dict(), str(workdir), tensorboard=False, command="python main.py")
  assert report["name"] == config.name
  assert report["dataset"]["train_counts"] == COUNTS.tolist()
  methods = [row["method"] for row in report["classification"]]
  if config.experiment == "classification":
    loss, references = config.classifier.loss, config.classifier.references
    assert methods == [loss, *references, *(f"{loss}+{m}" for m in config.decoupled.methods)]
  else:
    references = ["oracle", "unseen_exemplars"] if sum(report["dataset"]["left_out_counts"]) else []
    assert bool(references) == (config.dataset.profile != "natural")
    trained = ["real", *config.generators.names, *references]
    jointly = (
      []
      if config.experiment == "features"
      else [f"joint:{name}+{config.joint.loss}" for name in config.joint.generators]
    )
    assert methods == [
      *own_heads(config), *jointly, *fitted_heads(config),
      *(f"{n}+{s}" for n in trained for s in config.head.losses),
    ]  # fmt: skip
    assert set(report["generators"]) == set(config.generators.names)
    for measured in report["generators"].values():
      assert ("truth_test" in measured) == bool(references)
    check_choice(config, report, methods)
  for row in report["classification"]:
    assert 0 <= row["top1"]["mean"] <= 1
    if row["method"].endswith("+tau_norm"):
      assert row["description"].endswith("tau = 1 (as configured, nothing is held out)")
  page = (workdir / "report.html").read_text()
  assert all(method in page for method in methods)


def own_heads(config):
  """The rows of the encoders' own heads, where features have some."""
  if config.experiment == "features" or config.encoder.backbone.taps:
    return []
  losses = [f"own_head:{loss}" for loss in reversed(config.classifier.references)] + ["own_head"]
  return [name + suffix for name in losses for suffix in ("", "+logit_adjustment")]


def fitted_heads(config):
  """The rows of fitted heads and of their blend."""
  return [f"real+{name}" for name in (*config.head.fitted, "blend")] if config.head.fitted else []


def check_choice(config, report, methods):
  """Every method has a setting out of the candidates; what is recommended is no reference."""
  found, comparison = report["recommendation"], report["comparison"]
  assert comparison["method"].startswith("memdiff+")
  oracle = f"oracle+{comparison['method'].split('+')[1]}"
  assert comparison["reference"] == (oracle if oracle in methods else None)
  names = ("real", *config.generators.names)
  retrained = config.selection.folds and config.selection.encoder == "retrained"
  own = own_heads(config)[-2:] if retrained else []
  trained = [m for m in methods if m.split("+")[0] in names and m not in fitted_heads(config)]
  assert set(report["choices"]) == {*own, *trained}
  for method, choice in report["choices"].items():
    assert choice["exponent"] in (*config.head.exponents, 1.0)
    assert choice["fill"] == (16 if method.split("+")[0] in config.generators.names else 0)
    assert choice["tau"] in (*config.head.taus, 1.0)
  if config.selection.folds == 0:
    assert found is None
    return
  assert set(found["scores"]) == {*report["choices"], *fitted_heads(config)}
  assert found["method"] in (found["best"], found["control"])
  assert found["control"].split("+")[0] in ("real", "own_head")
  assert found["control"] == comparison["control"]
  assert found["basis"] == {
    "folds": 2, "repeats": config.selection.repeats, "encoder": config.selection.encoder,
  }  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("_small_parts")
def test_features_of_inner_stages_have_no_head_of_their_own(tmp_path):
  """Encoders that are retrained for every fold have heads, but not on these features."""
  config = shrunken("digits_lt", "default", tmp_path)
  config.encoder.backbone.taps = ("2:2", "1:1")
  config.head.training.start = "zeros"
  config.head.fitted = ()
  assert config.selection.encoder == "retrained"
  report = pipeline.run(config.to_dict(), str(tmp_path / "run"), tensorboard=False, command="")
  assert not any("own_head" in row["method"] for row in report["classification"])
  assert not any("own_head" in method for method in report["recommendation"]["scores"])
  with np.load(tmp_path / "run" / "memory_bank" / "features.npz") as file:
    assert set(file) == {"train", "left_out", "test"}
    assert file["train"].shape == (1, COUNTS.sum(), 5 * 8)
  with np.load(tmp_path / "run" / "recommended_head.npz") as file:
    assert (file["kernel"].shape, file["bias"].shape) == ((1, 5 * 8, 4), (1, 4))
