"""The evaluator of generated images: sets that are read, its table and JSON, wrong input."""

import json

import numpy as np
import pytest
from PIL import Image

from memdiff.errors import DataError
from memdiff.evaluation import image_sets, images, networks

NUMBER, SIDE = 90, 32


def pictures(seed=0, number=NUMBER, side=SIDE, channels=3):
  """Blocks of one colour per quarter, and noise."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(40, 216, (number, 2, 2, channels))
  fine = coarse.repeat(side // 2, axis=1).repeat(side // 2, axis=2)
  return (fine + rng.integers(-20, 21, fine.shape)).astype(np.uint8)


@pytest.fixture(autouse=True)
def network(monkeypatch):
  """Means of the quarters in place of a network."""

  def features(block):
    half = block.shape[1] // 2
    quarters = np.asarray(block, np.float32).reshape(len(block), 2, half, 2, half, 3)
    return quarters.mean(axis=(2, 4)).reshape(len(block), -1)

  def classify(rows):
    logits = rows[:, :5] / 50
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

  monkeypatch.setattr(networks, "make_network", lambda name, weights: (features, classify))


def run(tmp_path, generated, reference, *options):
  """(exit code, result) of the command with small sets."""
  out = tmp_path / "result.json"
  small = ("--side=32", "--kid_size=40", f"--json={out}")
  code = images.main([f"--generated={generated}", f"--reference={reference}", *small, *options])
  return code, json.loads(out.read_text()) if out.exists() else None


def npz(path, **arrays):
  np.savez(path, **arrays)
  return path


def folder(path, pixels):
  path.mkdir()
  for i, image in enumerate(pixels):
    (path / str(i % 3)).mkdir(exist_ok=True)
    Image.fromarray(image).save(path / str(i % 3) / f"{i:03d}.png")
  return path


# --- sets ------------------------------------------------------------------------------------


def pixels_of(read, side=SIDE):
  return np.concatenate(list(read.blocks(side)))


@pytest.mark.parametrize(
  "change",
  [lambda x: x, lambda x: x / np.float32(255), lambda x: (x / 127.5 - 1).astype(np.float32)],
)
def test_ranges_of_numbers_are_told_apart(change, tmp_path):
  made = pictures()
  path = npz(tmp_path / "a.npz", images=change(made))
  np.testing.assert_array_equal(pixels_of(image_sets.read(str(path))), made)


def test_a_folder_is_read_at_any_depth_in_order_of_names(tmp_path):
  made = pictures(number=7)
  order = sorted(range(7), key=lambda i: (i % 3, i))
  found = image_sets.read(str(folder(tmp_path / "set", made)))
  assert len(found) == 7
  np.testing.assert_array_equal(pixels_of(found), made[order])


def test_grey_images_become_rgb_and_other_sizes_are_resized(tmp_path):
  grey = pictures(channels=1, number=3)
  found = image_sets.read(str(npz(tmp_path / "a.npz", images=grey)))
  np.testing.assert_array_equal(pixels_of(found), grey.repeat(3, axis=-1))
  small = pixels_of(found, 16)
  expected = Image.fromarray(grey[0].repeat(3, axis=-1)).resize((16, 16), Image.BICUBIC)
  np.testing.assert_array_equal(small[0], np.asarray(expected))


def test_sets_larger_than_a_block_are_read_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(image_sets, "BLOCK", 4)
  made = pictures(number=10)
  read = image_sets.read(str(npz(tmp_path / "a.npz", images=made)))
  assert [len(block) for block in read.blocks(SIDE)] == [4, 4, 2]
  network, _ = networks.make_network("", "")
  np.testing.assert_allclose(images.encode(read, network, SIDE), network(made), rtol=1e-6)


# --- the command -----------------------------------------------------------------------------


def test_the_table_and_the_json_say_the_same_and_what_it_depends_on(tmp_path, capsys):
  real, made = npz(tmp_path / "r.npz", images=pictures(0)), folder(tmp_path / "g", pictures(1))
  code, result = run(tmp_path, made, real)
  assert code == 0
  metrics, printed = result["metrics"], capsys.readouterr().out
  assert set(metrics) == {
    "fd_efficientnet_lite0", "kid", "kid_std", "precision", "recall", "density", "coverage", "f8",
    "f1_8", "is_efficientnet_lite0", "is_efficientnet_lite0_std",
  }  # fmt: skip
  assert f"{metrics['fd_efficientnet_lite0']:.4g}" in printed and "fid" not in printed.lower()
  assert result["reference"] == {"path": str(real), "number": NUMBER}
  assert result["resize"] == "Pillow, bicubic, 32 px" and result["kid_size"] == 40


def test_the_evaluator_sees_missing_classes_and_repeated_images(tmp_path):
  made = pictures(0, 240)
  bright = made.mean(axis=(1, 2, 3))
  real = npz(tmp_path / "r.npz", images=made[:120])
  sets = {
    "as good": made[120:],
    "half missing": made[120:][bright[120:] > np.median(bright)],
    "repeated": made[120:132].repeat(10, axis=0),
  }
  found = {
    name: run(tmp_path, npz(tmp_path / f"{i}.npz", images=x), real)[1]["metrics"]
    for i, (name, x) in enumerate(sets.items())
  }
  for worse in ("half missing", "repeated"):
    assert found[worse]["fd_efficientnet_lite0"] > 1.5 * found["as good"]["fd_efficientnet_lite0"]
    assert found[worse]["coverage"] < found["as good"]["coverage"] - 0.1


# --- classes and copies ------------------------------------------------------------------------


def test_classes_are_judged_one_by_one_and_copies_told(tmp_path, capsys):
  real, train = pictures(0), pictures(2, 30)
  made = pictures(1)
  made[:9] = train[:9]  # copies
  labels = np.arange(NUMBER) % 3
  made[labels == 2] //= 3  # the third class is off
  counts = np.repeat([0, 1, 2], [25, 3, 2])
  options = (
    "--by_class",
    f"--train={npz(tmp_path / 't.npz', images=train, labels=counts)}",
  )
  generated = npz(tmp_path / "g.npz", images=made, labels=labels)
  code, result = run(tmp_path, generated, folder(tmp_path / "r", real), *options)
  assert code == 0
  classes, metrics = result["classes"], result["metrics"]
  assert list(classes) == ["0", "1", "2"] and classes["2"]["train"] == 2
  assert classes["2"]["kid"] > 5 * abs(classes["0"]["kid"])
  assert classes["2"]["diversity"] < 0.5 < classes["1"]["diversity"]
  assert all(row["generated"] == row["real"] == 30 for row in classes.values())
  copies = ((labels != 2) & (np.arange(NUMBER) < 9)).sum() / NUMBER
  assert metrics["copied"] == pytest.approx(copies)
  assert metrics["fd_efficientnet_lite0_few"] > metrics["fd_efficientnet_lite0"]
  assert metrics["diversity"] == pytest.approx(
    np.mean([row["diversity"] for row in classes.values()])
  )
  printed = capsys.readouterr().out.splitlines()
  assert printed[-3].split()[0] == "2"  # the farthest comes first


def test_a_folder_tells_classes_by_its_first_folders(tmp_path):
  place = folder(tmp_path / "r", pictures(0, 6))
  assert image_sets.read_labels(str(place)).tolist() == ["0", "0", "1", "1", "2", "2"]


@pytest.mark.parametrize(
  ("case", "words"),
  [
    ("no labels", "g.npz does not tell the classes of its images; it needs `labels`"),
    ("unknown class", "The class '5' of"),
    ("size", "are 16 x 16 and 32 x 32 pixels; copies can only be told among images of one size"),
    ("features", "--train needs images, in it and in --generated, not features"),
  ],
)
def test_what_is_missing_for_classes_and_copies_is_one_sentence(case, words, tmp_path, capsys):
  side = 16 if case == "size" else SIDE
  labels = {} if case == "no labels" else {"labels": np.arange(NUMBER) % 3}
  if case == "unknown class":
    labels["labels"] = labels["labels"] + 5
  made = npz(tmp_path / "g.npz", images=pictures(1, side=side), **labels)
  real = npz(tmp_path / "r.npz", images=pictures(0), labels=np.arange(NUMBER) % 3)
  train = real
  if case == "features":
    train = npz(tmp_path / "t.npz", features=np.ones((9, 4)))
  option = f"--train={train}" if case in ("size", "features") else "--by_class"
  assert run(tmp_path, made, real, option)[0] != 0
  assert words in capsys.readouterr().err


def test_features_that_are_there_need_no_network(tmp_path):
  rng = np.random.default_rng(0)
  paths = [npz(tmp_path / f"{i}.npz", features=rng.normal(size=(60, 5))) for i in range(2)]
  code, result = run(tmp_path, *paths)
  assert code == 0 and result["network"] == "given_features" and result["resize"] is None
  assert "fd_given_features" in result["metrics"] and "is_given_features" not in result["metrics"]


@pytest.mark.parametrize(
  ("arrays", "options", "words"),
  [
    ({"images": pictures()}, ["--kid_size=500"], "subsets of 500 rows, but a set has only 90"),
    ({"images": pictures(number=45)}, ["--k=45"], "more than 45 rows, but a set has 45"),
    ({"images": pictures()}, ["--side=8"], "--side is 8"),
    ({"images": 3.5 * np.ones((9, 8, 8, 3))}, [], "float64 from 3.5 to 3.5; they must be uint8"),
    ({"images": np.full((9, 8, 8, 3), np.nan)}, [], "float64 from nan to nan; they must be uint8"),
    ({"images": np.zeros((9, 8, 8, 3), np.int32)}, [], "are int32; they must be uint8"),
    ({"images": np.zeros((9, 8, 8, 2), np.uint8)}, [], "(9, 8, 8, 2); they must be [N, H, W, 1 or"),
    ({"features": np.zeros((90, 12))}, [], "One set holds features and the other images"),
    ({"pixels": np.zeros(3)}, [], "holds neither `images`"),
  ],
)
def test_wrong_sets_are_one_sentence(arrays, options, words, tmp_path, capsys):
  real = npz(tmp_path / "r.npz", images=pictures())
  code, result = run(tmp_path, npz(tmp_path / "g.npz", **arrays), real, *options)
  message = capsys.readouterr().err
  assert code in (1, 2) and result is None
  assert message.startswith("memdiff: ") and message.count("\n") == 1 and words in message


@pytest.mark.parametrize("kind", ["nothing", "no images", "torn"])
def test_places_without_images_are_one_sentence(kind, tmp_path):
  place = tmp_path / "place"
  if kind == "no images":
    place.mkdir()
    (place / "notes.txt").write_text("none")
  if kind == "torn":
    place.write_bytes(b"PK\x03\x04torn")
  words = {"nothing": "There is no folder", "no images": "There is no image", "torn": "Cannot read"}
  with pytest.raises(DataError, match=words[kind]):
    image_sets.read(str(place))


def test_unknown_networks_are_refused_with_those_that_exist(tmp_path, monkeypatch, capsys):
  monkeypatch.undo()
  real = npz(tmp_path / "r.npz", images=pictures())
  code, _ = run(tmp_path, real, real, "--network=resnet")
  assert code == 2
  words = "--network is 'resnet', but must be one of efficientnet_lite0, inception_fid, dinov2."
  assert words in capsys.readouterr().err


def test_files_of_one_folder_are_one_set_in_order_of_names(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1)).astype(np.uint8)
  for name, part in (("b", images[4:]), ("a", images[:4])):
    np.savez(tmp_path / f"{name}.npz", images=part, labels=np.zeros(len(part)))
  (block,) = image_sets.read(str(tmp_path)).blocks(8)
  np.testing.assert_array_equal(block, images.repeat(3, axis=-1))
  np.savez(tmp_path / "c.npz", images=images[:, :4])
  with pytest.raises(DataError, match="differ in what they hold"):
    image_sets.read(str(tmp_path))
  np.savez(tmp_path / "c.npz", features=np.ones((2, 3)))
  with pytest.raises(DataError, match="differ in what they hold"):
    image_sets.read(str(tmp_path))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_features_of_the_reference_are_kept_until_it_changes(tmp_path, kind, capsys):
  pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
  place = tmp_path / ("set" if kind == "folder" else "set.npz")

  def write(pixels):
    if kind == "file":
      np.savez(place, images=pixels)
      return
    place.mkdir(exist_ok=True)
    for number, image in enumerate(pixels):
      Image.fromarray(image).save(place / f"{number}.png")

  calls = []

  def network(block):
    calls.append(len(block))
    return block.reshape(len(block), -1)[:, :5].astype(np.float32)

  def features(key="a", side=8):
    found = image_sets.read(str(place))
    return images.reference_features(found, network, side, key, tmp_path / "kept")

  write(pixels)
  first = features()
  np.testing.assert_array_equal(features(), first)
  assert len(calls) == 1 and "taken from" in capsys.readouterr().out
  features(key="b")
  features(side=4)
  write(pixels[::-1])
  assert not np.array_equal(features(), first) and len(calls) == 4
