"""PyTorch state dicts: every array in its place, or one sentence that names what does not fit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from memdiff.classifier import backbones, pretrained
from memdiff.classifier.backbones import Architecture, ResNet
from memdiff.errors import DataError

CLASSES = 3
NETWORKS = {
  "cifar": Architecture((2, 1, 1), (4, 8, 16), for_small_images=True),
  "basic": Architecture((1, 2), (4, 6), for_small_images=False),
  "bottleneck": Architecture((2, 1), (3, 4), for_small_images=False, bottleneck=True),
}
SIZE = 16
IMAGES = np.random.default_rng(1).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)


def state_dict(architecture, *, head="fc", prefix="", classes=CLASSES, seed=0):
  """Arrays under the names and in the layout that PyTorch gives them."""
  rng = np.random.default_rng(seed)
  arrays = {}

  def conv(name, outputs, inputs, size):
    shape = (outputs, inputs, size, size)
    arrays[f"{name}.weight"] = rng.normal(size=shape) / np.sqrt(inputs * size**2)

  def norm(name, size):
    arrays[f"{name}.weight"] = 0.5 + rng.random(size)
    arrays[f"{name}.bias"] = rng.normal(size=size)
    arrays[f"{name}.running_mean"] = rng.normal(size=size) * 0.2
    arrays[f"{name}.running_var"] = 0.5 + rng.random(size)
    arrays[f"{name}.num_batches_tracked"] = np.array(7)

  small, wide = architecture.for_small_images, 4 if architecture.bottleneck else 1
  width = architecture.widths[0]
  conv("conv1", width, 3, 3 if small else 7)
  norm("bn1", width)
  inputs = width
  for stage, (blocks, width) in enumerate(
    zip(architecture.stage_sizes, architecture.widths, strict=True)
  ):
    for block in range(blocks):
      name = f"layer{stage + 1}.{block}"
      sizes = (1, 3, 1) if architecture.bottleneck else (3, 3)
      outputs = [width] * (len(sizes) - 1) + [wide * width]
      for number, (size, a, b) in enumerate(
        zip(sizes, [inputs, *outputs], outputs, strict=False), 1
      ):
        conv(f"{name}.conv{number}", b, a, size)
        norm(f"{name}.bn{number}", b)
      if not small and (inputs != wide * width or (stage and not block)):
        conv(f"{name}.downsample.0", wide * width, inputs, 1)
        norm(f"{name}.downsample.1", wide * width)
      inputs = wide * width
  arrays[f"{head}.weight"] = rng.normal(size=(classes, inputs))
  arrays[f"{head}.bias"] = rng.normal(size=classes)
  return {
    prefix + name: value if value.dtype == int else value.astype(np.float32)
    for name, value in arrays.items()
  }


def save(path, arrays):
  """Writes .npz or .safetensors, as the name of `path` says; returns the path as text."""
  if path.suffix == ".npz":
    np.savez(path, **arrays)
  else:
    safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, path)
  return str(path)


def variables_of(model):
  """Zeros in the shape of the model's variables."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def equal(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


# --- what a state dict computes, in NumPy, by PyTorch's names --------------------------------


def convolve(x, weight, stride):
  """[B, in, H, W] and [out, in, k, k], padding k // 2."""
  size = weight.shape[-1]
  half = size // 2
  padded = np.pad(x, ((0, 0), (0, 0), (half, half), (half, half)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
  return np.einsum("bihwkl,oikl->bohw", windows[:, :, ::stride, ::stride], weight)


def forward(arrays, architecture, x):
  """(logits, features) in evaluation mode."""

  def norm(x, name):
    mean, var, scale, bias = (
      arrays[f"{name}.{part}"][None, :, None, None]
      for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

  x = x.transpose(0, 3, 1, 2).astype(np.float64)
  small = architecture.for_small_images
  x = np.maximum(norm(convolve(x, arrays["conv1.weight"], 1 if small else 2), "bn1"), 0)
  if not small:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    x = windows[:, :, ::2, ::2].max(axis=(-1, -2))
  for stage, blocks in enumerate(architecture.stage_sizes):
    for block in range(blocks):
      name, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
      # A bottleneck strides in its 3x3 convolution, as torchvision's (ResNet "v1.5").
      strides = (1, stride, 1) if architecture.bottleneck else (stride, 1)
      y = x
      for number, own in enumerate(strides, 1):
        y = norm(convolve(y, arrays[f"{name}.conv{number}.weight"], own), f"{name}.bn{number}")
        y = np.maximum(y, 0) if number < len(strides) else y
      if f"{name}.downsample.0.weight" in arrays:
        x = convolve(x, arrays[f"{name}.downsample.0.weight"], stride)
        x = norm(x, f"{name}.downsample.1")
      elif stride == 2:
        zeros = (y.shape[1] - x.shape[1]) // 2
        x = np.pad(x[:, :, ::2, ::2], ((0, 0), (zeros, zeros), (0, 0), (0, 0)))
      x = np.maximum(x + y, 0)
  features = x.mean(axis=(2, 3))
  return features @ arrays["fc.weight"].T + arrays["fc.bias"], features


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_network_computes_what_the_state_dict_says(network, suffix, tmp_path):
  architecture = NETWORKS[network]
  arrays = state_dict(architecture)
  model = ResNet(CLASSES, architecture)
  path = save(tmp_path / f"weights{suffix}", arrays)
  loaded = pretrained.load(path, variables_of(model), head=True)
  made = jax.jit(lambda v, x: model.apply(v, x, train=False))(loaded, IMAGES)
  for ours, theirs in zip(made, forward(arrays, architecture, IMAGES), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50"])
def test_state_dicts_of_the_named_networks_fill_every_array(name, tmp_path):
  architecture = backbones.BACKBONES[name]
  narrow = Architecture(
    architecture.stage_sizes, tuple(w // 16 for w in architecture.widths),
    architecture.for_small_images, architecture.bottleneck,
  )  # fmt: skip
  arrays = state_dict(narrow)
  variables = variables_of(ResNet(CLASSES, narrow))
  loaded = pretrained.load(save(tmp_path / "w.npz", arrays), variables, head=True)
  assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, variables)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(loaded))
  sums = sorted(float(np.abs(x).sum()) for x in jax.tree.leaves(loaded))
  expected = sorted(
    float(np.abs(a).sum()) for n, a in arrays.items() if not n.endswith("num_batches_tracked")
  )
  np.testing.assert_allclose(sums, expected, rtol=1e-5)


def test_the_names_are_those_of_torchvision():
  """A few of the names in torchvision's resnet50, and how many there are."""
  names = set(state_dict(backbones.BACKBONES["resnet50"]))
  assert len(names) == 320
  assert names >= {
    "conv1.weight", "bn1.num_batches_tracked", "layer1.0.downsample.0.weight",
    "layer1.0.downsample.1.running_var", "layer3.5.conv3.weight", "layer4.2.bn3.bias", "fc.weight",
  }  # fmt: skip


CIFAR = NETWORKS["cifar"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """What the plainest file of weights loads into."""
  path = save(tmp_path_factory.mktemp("weights") / "plain.npz", state_dict(CIFAR))
  return pretrained.load(path, variables_of(ResNet(CLASSES, CIFAR)), head=True)


@pytest.mark.parametrize(
  "changes", [{"head": "linear"}, {"prefix": "module."}, {"head": "linear", "prefix": "module."}]
)
def test_other_names_of_the_same_arrays_load_alike(changes, loaded, tmp_path):
  path = save(tmp_path / "w.safetensors", state_dict(CIFAR, **changes))
  again = pretrained.load(path, variables_of(ResNet(CLASSES, CIFAR)), head=True)
  assert equal(again, loaded)


def test_counters_of_batches_are_neither_read_nor_missed(loaded, tmp_path):
  arrays = {n: a for n, a in state_dict(CIFAR).items() if not n.endswith("num_batches_tracked")}
  path = save(tmp_path / "w.npz", arrays)
  assert equal(pretrained.load(path, variables_of(ResNet(CLASSES, CIFAR)), head=True), loaded)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_precisions_become_float32(dtype, loaded, tmp_path):
  arrays = {n: a.astype(dtype) for n, a in state_dict(CIFAR).items()}
  path = save(tmp_path / "w.safetensors", arrays)
  again = pretrained.load(path, variables_of(ResNet(CLASSES, CIFAR)), head=True)
  for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(loaded), strict=True):
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("head", ["fc", "linear"])
def test_without_the_head_it_stays_as_it_was_drawn(head, loaded, tmp_path):
  """Whatever classes, and whatever kind of head, the file was trained for."""
  path = save(tmp_path / "w.npz", state_dict(CIFAR, head=head, prefix="module.", classes=1000))
  for cosine in (None, 16.0):
    variables = variables_of(ResNet(5, CIFAR, cosine_scale=cosine))
    variables["params"]["head"]["kernel"] += 0.25
    new = pretrained.load(path, variables, head=False)
    assert equal(new["params"]["head"], variables["params"]["head"])
    for collection in ("params", "batch_stats"):
      rest = {name: tree for name, tree in new[collection].items() if name != "head"}
      assert equal(rest, {n: t for n, t in loaded[collection].items() if n != "head"})


def test_a_file_without_a_head_will_do_where_none_is_read(loaded, tmp_path):
  arrays = {n: a for n, a in state_dict(CIFAR).items() if not n.startswith("fc.")}
  path = save(tmp_path / "w.npz", arrays)
  new = pretrained.load(path, variables_of(ResNet(CLASSES, CIFAR)), head=False)
  assert equal(new["batch_stats"], loaded["batch_stats"])
  message = refusal(path)
  assert "head/kernel is missing" in message and "head/bias is missing" in message


# --- what does not fit -----------------------------------------------------------------------


def refusal(path, head=True, classes=CLASSES):
  """The one sentence that a file is refused with."""
  with pytest.raises(DataError) as caught:
    pretrained.load(str(path), variables_of(ResNet(classes, CIFAR)), head=head)
  message = str(caught.value)
  assert "\n" not in message and message.endswith(".") and str(path) in message
  return message


def test_every_array_that_does_not_fit_is_listed(tmp_path):
  arrays = state_dict(CIFAR)
  del arrays["layer2.0.bn1.running_mean"], arrays["layer3.0.conv2.weight"]
  arrays["layer1.0.conv1.weight"] = arrays["layer1.0.conv1.weight"][:, :2]
  arrays["bn1.bias"] = np.zeros(9, np.float32)
  arrays["layer1.1.se.fc.weight"] = np.zeros((2, 2), np.float32)
  arrays["layer1.2.conv1.weight"] = arrays["layer1.1.conv1.weight"]
  arrays["conv1.bias"] = np.zeros(4, np.float32)
  arrays["epoch"] = np.array(3.0)
  message = refusal(save(tmp_path / "w.npz", arrays))
  for words in (
    "layer2_0/bn1/mean is missing",
    "layer3_0/conv2/kernel is missing",
    "layer1.0.conv1.weight gives (3, 3, 2, 4) where (3, 3, 4, 4) is needed",
    "bn1.bias gives (9,) where (4,) is needed",
    "layer1.1.se.fc.weight has no place in the backbone",
    "layer1.2.conv1.weight has no place",
    "conv1.bias has no place",
    "epoch has no place",
  ):
    assert words in message, words
  assert message.count(" is missing") == 2 and message.count("has no place") == 4
  assert message.count(" is needed") == 2
  assert "config.encoder.backbone.name" in message


def test_another_number_of_classes_points_to_init_head(tmp_path):
  path = save(tmp_path / "w.npz", state_dict(CIFAR))
  message = refusal(path, classes=5)
  assert "fc.weight gives (16, 3) where (16, 5) is needed" in message
  assert "fc.bias gives (3,) where (5,) is needed" in message
  assert "config.encoder.init_head=False if only the head differs" in message


def test_a_misfit_beside_the_head_does_not_point_there(tmp_path):
  arrays = state_dict(CIFAR)
  del arrays["conv1.weight"]
  message = refusal(save(tmp_path / "w.npz", arrays), head=False)
  assert "conv1/kernel is missing" in message and "init_head" not in message


def test_a_linear_head_does_not_fit_a_cosine_head(tmp_path):
  path = save(tmp_path / "w.npz", state_dict(CIFAR))
  with pytest.raises(DataError, match=r"fc\.bias has no place in the backbone.*init_head=False"):
    pretrained.load(path, variables_of(ResNet(CLASSES, CIFAR, cosine_scale=9.0)), head=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value, tmp_path):
  arrays = state_dict(CIFAR)
  arrays["layer2.0.conv1.weight"][1, 2, 0, 0] = value
  message = refusal(save(tmp_path / "w.npz", arrays))
  assert "not finite in layer2.0.conv1.weight." in message


@pytest.mark.parametrize("name", ["none.npz", "none.safetensors"])
def test_a_missing_file_is_named(name, tmp_path):
  assert "There is no file" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights", "weights.npy"])
def test_another_format_is_refused_with_the_way_out(name, tmp_path):
  (tmp_path / name).write_bytes(b"anything")
  message = refusal(tmp_path / name)
  assert "neither an .npz file nor a .safetensors file" in message
  assert "safetensors.torch.save_file" in message


class Bomb:
  """Would leave a trace where it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (str(self.path), "w"))


def test_nothing_is_unpickled(tmp_path):
  trace = tmp_path / "trace"
  np.savez(tmp_path / "w.npz", **{"conv1.weight": np.array([Bomb(trace)], dtype=object)})
  assert "Cannot read the weights" in refusal(tmp_path / "w.npz")
  assert not trace.exists()


def test_one_array_without_a_name_is_no_state_dict(tmp_path):
  with (tmp_path / "w.npz").open("wb") as file:
    np.save(file, np.zeros(3))
  assert "one array without a name" in refusal(tmp_path / "w.npz")


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"junk" * 50])
def test_files_that_hold_something_else_are_refused(name, content, tmp_path):
  (tmp_path / name).write_bytes(content)
  assert "Cannot read the weights" in refusal(tmp_path / name)


def test_a_type_that_numpy_does_not_know_is_refused(tmp_path):
  header = b'{"conv1.weight":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
  path = tmp_path / "w.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
  assert "Cannot read the weights" in refusal(path)


@pytest.mark.parametrize("name", ["w.npz", "packed.npz", "w.safetensors"])
def test_a_torn_or_altered_file_is_refused_or_read_whole(name, tmp_path):
  """Cut anywhere, or with a byte changed anywhere: weights or a sentence, never a traceback."""
  arrays = {"conv1.weight": np.arange(60.0).reshape(5, 12), "fc.bias": np.arange(20.0)}
  path = tmp_path / name
  np.savez_compressed(path, **arrays) if name == "packed.npz" else save(path, arrays)
  whole, rng = path.read_bytes(), np.random.default_rng(0)
  refused = []
  for attempt in range(150):
    damaged = bytearray(whole)
    if attempt % 3:
      damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
    else:
      del damaged[rng.integers(len(whole)) :]
    path.write_bytes(damaged)
    try:
      pretrained.read(str(path))
    except DataError as error:
      refused.append(str(error))
  assert len(refused) >= 50  # all that were cut, at least
  assert all(str(path) in message for message in refused)


# --- against PyTorch itself ------------------------------------------------------------------


def torch_blocks(torch, architecture):
  """The network as PyTorch modules under torchvision's names."""
  nn, functional = torch.nn, torch.nn.functional

  class Block(nn.Module):
    def __init__(self, inputs, width, stride):
      super().__init__()
      wide = 4 * width if architecture.bottleneck else width
      plan = (
        [(inputs, width, 1, 1), (width, width, 3, stride), (width, wide, 1, 1)]
        if architecture.bottleneck
        else [(inputs, width, 3, stride), (width, width, 3, 1)]
      )
      self.number = len(plan)
      for n, (a, b, size, own) in enumerate(plan, 1):
        setattr(self, f"conv{n}", nn.Conv2d(a, b, size, own, size // 2, bias=False))
        setattr(self, f"bn{n}", nn.BatchNorm2d(b))
      self.stride, self.added = stride, wide - inputs
      if (stride > 1 or self.added) and not architecture.for_small_images:
        self.downsample = nn.Sequential(
          nn.Conv2d(inputs, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
        )

    def forward(self, x):
      y = x
      for n in range(1, self.number + 1):
        y = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(y))
        y = torch.relu(y) if n < self.number else y
      if hasattr(self, "downsample"):
        x = self.downsample(x)
      elif self.added:
        x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))
      return torch.relu(x + y)

  class Net(nn.Module):
    def __init__(self):
      super().__init__()
      small, width = architecture.for_small_images, architecture.widths[0]
      self.conv1 = (
        nn.Conv2d(3, width, 3, 1, 1, bias=False)
        if small
        else nn.Conv2d(3, width, 7, 2, 3, bias=False)
      )
      self.bn1 = nn.BatchNorm2d(width)
      self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
      stages = zip(architecture.stage_sizes, architecture.widths, strict=True)
      for stage, (blocks, own) in enumerate(stages, 1):
        layers = []
        for block in range(blocks):
          layers.append(Block(width, own, 2 if stage > 1 and block == 0 else 1))
          width = 4 * own if architecture.bottleneck else own
        setattr(self, f"layer{stage}", nn.Sequential(*layers))
      self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
      x = self.pool(torch.relu(self.bn1(self.conv1(x))))
      for stage in range(1, len(architecture.stage_sizes) + 1):
        x = getattr(self, f"layer{stage}")(x)
      features = x.mean(dim=(2, 3))
      return self.fc(features), features

  return Net()


@pytest.mark.parametrize("network", NETWORKS)
def test_the_network_computes_what_pytorch_computes(network, tmp_path):
  torch = pytest.importorskip("torch", reason="PyTorch is no dependency of memdiff")
  architecture = NETWORKS[network]
  torch.manual_seed(0)
  theirs = torch_blocks(torch, architecture)
  x = torch.tensor(IMAGES.transpose(0, 3, 1, 2))
  for _ in range(3):  # moves the batch statistics
    theirs.train()(x)
  arrays = {name: value.numpy() for name, value in theirs.state_dict().items()}
  assert {re.sub("^module.", "", n) for n in state_dict(architecture)} == set(arrays)
  model = ResNet(CLASSES, architecture)
  path = save(tmp_path / "w.safetensors", arrays)
  loaded = pretrained.load(path, variables_of(model), head=True)
  made = jax.jit(lambda v, x: model.apply(v, x, train=False))(loaded, IMAGES)
  with torch.no_grad():
    for ours, expected in zip(made, theirs.eval()(x), strict=True):
      np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-4, atol=1e-4)
