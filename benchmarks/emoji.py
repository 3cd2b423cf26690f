"""Emoji with captions, a naturally long-tailed set of 99 classes, as a folder of images.

  npm pack emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0
  python -m benchmarks.emoji --packages=DIR --out=DIR2

DIR holds the two packages as npm packs them (Twemoji, CC-BY 4.0; Noto Emoji, Apache-2.0). Classes
are subcategories, such as animal-bird, of 2 to 518 images; captions are the names of the emoji.
Both drawings of an emoji go to the same part: a quarter of each class is for the test.
"""

import argparse
import csv
import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image

VENDORS = ("twitter", "google")
SIDE, TEST_SHARE = 64, 0.25


def read_package(folder: pathlib.Path, vendor: str) -> tuple[list[dict], dict[str, bytes]]:
  """(the entries of all emoji, name of an image -> its .png file)."""
  files = sorted(folder.glob(f"emoji-datasource-{vendor}-*.tgz"))
  if not files:
    raise SystemExit(f"{folder} has no emoji-datasource-{vendor}-*.tgz; make it with npm pack.")
  prefix, images, entries = f"package/img/{vendor}/{SIDE}/", {}, []
  with tarfile.open(files[-1]) as archive:
    for member in archive:
      if member.name == "package/emoji.json":
        entries = json.load(archive.extractfile(member))
      elif member.name.startswith(prefix):
        images[member.name.removeprefix(prefix)] = archive.extractfile(member).read()
  return entries, images


def on_white(png: bytes) -> Image.Image:
  """RGB, what is transparent made white."""
  image = Image.open(io.BytesIO(png)).convert("RGBA")
  white = Image.new("RGBA", image.size, (255, 255, 255, 255))
  return Image.alpha_composite(white, image).convert("RGB")


def parts_of(entries: list[dict], seed: int = 0) -> dict[str, str]:
  """Image name -> "train" or "test"; a class of one emoji trains."""
  generator, part = np.random.default_rng(seed), {}
  classes = sorted({entry["subcategory"] for entry in entries})
  for name in classes:
    members = sorted(entry["image"] for entry in entries if entry["subcategory"] == name)
    number = max(round(TEST_SHARE * len(members)), 1) if len(members) > 1 else 0
    test = set(generator.permutation(len(members))[:number].tolist())
    part |= {image: "test" if i in test else "train" for i, image in enumerate(members)}
  return part


def prepare(packages: pathlib.Path, out: pathlib.Path) -> None:
  """Writes OUT/train and OUT/test, each with a folder per class and metadata.csv."""
  found = {vendor: read_package(packages, vendor) for vendor in VENDORS}
  entries = found[VENDORS[0]][0]
  entries = [entry for entry in entries if all(entry[f"has_img_{vendor}"] for vendor in VENDORS)]
  part, rows = parts_of(entries), {"train": [], "test": []}
  for entry in entries:
    for vendor in VENDORS:
      place = f"{entry['subcategory']}/{vendor}_{entry['image']}"
      path = out / part[entry["image"]] / place
      path.parent.mkdir(parents=True, exist_ok=True)
      on_white(found[vendor][1][entry["image"]]).save(path)
      rows[part[entry["image"]]].append((place, entry["name"].lower()))
  for name, of_part in rows.items():
    with open(out / name / "metadata.csv", "w", encoding="utf-8", newline="") as file:
      csv.writer(file).writerows([("file_name", "text"), *sorted(of_part)])
  print(f"{len(rows['train'])} train and {len(rows['test'])} test images of {len(entries)} emoji")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--packages", type=pathlib.Path, required=True, help="folder of two .tgz files"
  )
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the images")
  arguments = parser.parse_args()
  prepare(arguments.packages, arguments.out)


if __name__ == "__main__":
  main()
