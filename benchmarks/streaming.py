"""What it costs to train on images from disk: ImageNet's path on a generated set, at 224 px.

  python -m benchmarks.streaming [--data_dir DIR] [--gigabytes 2] [--json FILE] [--rounds N]

The set is written once into DIR, as `input_pipeline.prepare` stores ImageNet, and removed where DIR
was not given. Costs are CPU time, which other work on the machine changes least.
"""

import argparse
import contextlib
import functools
import io
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks import generated_images, timing
from input_pipeline import streaming, tfds_sources
from input_pipeline.lazy_images import LazyImages
from input_pipeline.source import Source
from input_pipeline.streaming import Order, StreamConfig

_SIZE, _BATCH, _BILINEAR = 224, 64, Image.Resampling.BILINEAR
_DEFAULT = StreamConfig()
_THREADS, _WORKERS, _LOADS = (1, 2, 4, 16), (0, 1, 2), (0.5, 0.8, 1.2)
_LATE = 100_000  # a step
_PROCESS = psutil.Process()


def _interleave(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
  """What every variant returns in each round; every other round goes backwards."""
  found = {name: [] for name in variants}
  for number in range(rounds):
    for name in list(variants)[:: -1 if number % 2 else 1]:
      found[name].append(variants[name]())
  return found


def _summary(values: list[float]) -> dict[str, Any]:
  return {
    "median": float(np.median(values)), "min": min(values), "max": max(values), "rounds": values,
  }  # fmt: skip


# --- stages on one thread --------------------------------------------------------------------


def _decode(data: bytes) -> Image.Image:
  return Image.open(io.BytesIO(data)).convert("RGB")


def _box(size: tuple[int, int], number: int) -> tuple[int, int, int, int]:
  """Left, top, right and bottom of the crop that `number` seeds."""
  left, top, width, height = streaming._random_box(*size, np.random.default_rng(number))
  return left, top, left + width, top + height


def _with_pillow(data: bytes, number: int) -> np.ndarray:
  """What any loader that decodes with Pillow has to do."""
  image = _decode(data)
  return np.asarray(image.crop(_box(image.size, number)).resize((_SIZE, _SIZE), _BILINEAR))


def _cpu_ms(call: Callable[[int], Any], numbers: list[int]) -> Callable[[], float]:
  """A measurement: CPU milliseconds of this thread per call, over all numbers."""

  def measure() -> float:
    start = time.thread_time()
    for number in numbers:
      call(number)
    return 1e3 * (time.thread_time() - start) / len(numbers)

  return measure


def stages(images: LazyImages, data_dir: pathlib.Path, rounds: int) -> dict[str, Any]:
  """CPU milliseconds per image of each stage, of all together and of Pillow alone.

  Args:
    images: the training images of the set in `data_dir`.
    data_dir: of TFDS.
    rounds: repeats.
  """
  builder = tfds_sources.make_builder(generated_images.NAME, str(data_dir))
  stored = tfds_sources.stored_examples(builder, "train")
  places = tfds_sources.read_index(generated_images.NAME, builder)["train_stored"].tolist()
  numbers = np.random.default_rng(0).choice(len(images), 100, replace=False).tolist()
  data = {i: stored[places[i]]["image"] for i in numbers}
  pictures = {i: _decode(data[i]) for i in numbers}

  def crop(image: Image.Image, number: int) -> np.ndarray:
    return streaming.random_resized_crop(image, _SIZE, np.random.default_rng(number))

  variants = {
    "record": lambda i: stored[places[i]]["image"],
    "decode": lambda i: _decode(data[i]),
    "crop and resize": lambda i: crop(pictures[i], i),
    "all": lambda i: crop(images.read(i), i),
    "all, with an array in between": lambda i: crop(Image.fromarray(np.asarray(images.read(i))), i),
    "Pillow alone, data in memory": lambda i: _with_pillow(data[i], i),
  }
  for i in numbers:  # all that claim to do the same
    same = [call(i) for name, call in variants.items() if "all" in name]
    assert all((image == same[0]).all() for image in same)
  times = _interleave({n: _cpu_ms(call, numbers) for n, call in variants.items()}, rounds)
  return {name: _summary(values) for name, values in times.items()}


def shortcuts(rounds: int) -> dict[str, Any]:
  """Two ways to crop that are faster and not the same, on pictures of 1000 x 750 pixels.

  Returns:
    Per way: CPU milliseconds, share of crops it applies to, and the mean and largest difference
    of pixels where it applies.
  """
  data = list(generated_images.jpegs(32, [(1000, 750)]))
  side = (_SIZE, _SIZE)

  def exact(number: int) -> np.ndarray:
    return _with_pillow(data[number], number)

  def within(number: int) -> np.ndarray:
    image = _decode(data[number])
    return np.asarray(image.resize(side, _BILINEAR, box=_box(image.size, number)))

  def draft(number: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data[number]))
    box, width = _box(image.size, number), image.width
    if min(box[2] - box[0], box[3] - box[1]) >= 2 * _SIZE:
      image.draft("RGB", (image.width // 2, image.height // 2))
    scale = image.width / width
    image = image.convert("RGB").crop([round(x * scale) for x in box])
    return np.asarray(image.resize(side, _BILINEAR))

  variants = {"crop, then resize": exact, "resize(box=)": within, "draft at half size": draft}
  numbers = list(range(len(data)))
  times = _interleave({n: _cpu_ms(call, numbers) for n, call in variants.items()}, rounds)
  found = {}
  for name, call in variants.items():
    apart = [np.abs(call(i).astype(int) - exact(i)) for i in numbers]
    changed = [x for x in apart if x.any()]
    found[name] = {
      "ms": _summary(times[name]),
      "share_changed": len(changed) / len(apart),
      "mean_difference": float(np.mean(changed)) if changed else 0.0,
      "largest_difference": int(np.max(apart)),
    }
  return found


# --- batches ---------------------------------------------------------------------------------


def _open(source: Source, config: StreamConfig, first_step: int = 0):
  return contextlib.closing(
    streaming.train_batches(
      source.train_images, source.train_labels, _BATCH, Order(0, first_step), config
    )
  )


def _cpu_seconds() -> float:
  """Of this process and its workers."""
  total = 0.0
  for process in (_PROCESS, *_PROCESS.children(recursive=True)):
    with contextlib.suppress(psutil.NoSuchProcess):
      times = process.cpu_times()
      total += times.user + times.system
  return total


def _ahead(config: StreamConfig) -> int:
  """Batches that may be ready before they are asked for."""
  return config.prefetch + 1 if not config.num_workers else config.num_workers * config.prefetch + 4


def throughput(source: Source, config: StreamConfig, batches: int) -> dict[str, float]:
  """Images per second, and per second of CPU time, once nothing that was read ahead is left."""
  start = time.perf_counter()
  with _open(source, config) as stream:
    next(stream)
    first = time.perf_counter() - start
    for _ in range(_ahead(config)):
      next(stream)
    start, cpu = time.perf_counter(), _cpu_seconds()
    for _ in range(batches):
      next(stream)
    images = batches * _BATCH
    return {
      "first_batch_s": first,
      "per_s": images / (time.perf_counter() - start),
      "per_cpu_s": images / (_cpu_seconds() - cpu),
    }


def views(images: LazyImages) -> dict[str, float]:
  """Evaluation views per second, and per second of CPU time."""
  start, cpu = time.perf_counter(), _cpu_seconds()
  for first in range(0, 4 * _BATCH, _BATCH):
    images[first : first + _BATCH]
  return {
    "per_s": 4 * _BATCH / (time.perf_counter() - start),
    "per_cpu_s": 4 * _BATCH / (_cpu_seconds() - cpu),
  }


def waits(source: Source, batches: int) -> dict[str, dict[str, float]]:
  """Share of the time in which a device waits for data.

  The device is a clock: a step takes as long as decoding a batch does, divided by a load, and
  begins when its batch is there and the step before is over. As in the training loop, the next
  batch is fetched while a step goes on. How long decoding takes is measured just before, and after.

  Returns:
    Per load the share, and the load by the time that decoding took before and after on average.
  """
  with _open(source, _DEFAULT) as stream:

    def seconds(sleep: float) -> tuple[float, float]:
      """Waiting, and in all."""
      waited, begin = 0.0, time.perf_counter()
      over = begin  # when the device has nothing more to do
      for _ in range(batches):
        next(stream)
        now = time.perf_counter()
        waited += max(now - over, 0.0)
        time.sleep(max(over - now, 0.0))
        over = time.perf_counter() + sleep
      return waited, time.perf_counter() - begin

    for _ in range(_ahead(_DEFAULT)):
      next(stream)
    found = {}
    for load in _LOADS:
      before = seconds(0)[1]
      sleep = before / batches / load
      for _ in range(_ahead(_DEFAULT)):
        time.sleep(sleep)
        next(stream)
      waited, total = seconds(sleep)
      for _ in range(_ahead(_DEFAULT)):
        next(stream)
      after = seconds(0)[1]
      actual = (before + after) / 2 / batches / sleep
      found[f"{load:g}"] = {"wait_share": waited / total, "load_by_both": actual}
  return found


def first_batch(source: Source, step: int) -> float:
  """Seconds until the batch of a step is there."""
  start = time.perf_counter()
  with _open(source, StreamConfig(2, 0, 1), step) as stream:
    next(stream)
    return time.perf_counter() - start


def memory(source: Source, batches: int) -> list[float]:
  """Resident MiB of this process after every eighth of a long stretch of batches."""
  found = []
  with _open(source, _DEFAULT) as stream:
    for number in range(1, batches + 1):
      next(stream)
      if number % (batches // 8) == 0:
        found.append(_PROCESS.memory_info().rss / 2**20)
  return found


# --- the page --------------------------------------------------------------------------------

_STEPS = {
  "record": "read the record",
  "decode": "decode",
  "crop and resize": "crop and resize",
  "all": "all of it",
  "all, with an array in between": "the same with an array between decoding and cropping",
  "Pillow alone, data in memory": "Pillow alone, data in memory: what any such loader pays",
}


def cost_table(result: Mapping[str, Any]) -> str:
  """What an image costs, step by step, and what the shortcuts would save and change."""
  lines = ["| step | CPU ms, median |", "|---|---|"]
  for name, times in result["stages_cpu_ms"].items():
    lines.append(f"| {_STEPS[name]} | {times['median']:.2f} |")
  lines += [
    "",
    "| way to crop | CPU ms, median | crops that change | by, of 255 |",
    "|---|---|---|---|",
  ]
  for name, way in result["shortcuts"].items():
    change = f"{way['share_changed']:.0%} | {way['mean_difference']:.2f}"
    lines.append(f"| `{name}` | {way['ms']['median']:.2f} | {change} |")
  return "\n".join(lines)


def throughput_table(result: Mapping[str, Any]) -> str:
  lines = ["| processes and threads | images/s | per CPU second |", "|---|---|---|"]
  for name, measured in result["throughput"].items():
    rates = (measured[key]["median"] for key in ("per_s", "per_cpu_s"))
    lines.append(f"| {name} | " + " | ".join(f"{rate:.0f}" for rate in rates) + " |")
  return "\n".join(lines)


def waits_table(result: Mapping[str, Any]) -> str:
  """Share of the time without data at each load, of every round."""
  lines = ["| load (decoding / step) | waiting, each round |", "|---|---|"]
  for load in result["waits"][0]:
    shares = (f"{100 * run[load]['wait_share']:.1f} %" for run in result["waits"])
    lines.append(f"| {load} | {', '.join(shares)} |")
  return "\n".join(lines)


def resuming_text(result: Mapping[str, Any]) -> str:
  first = {int(step): times["median"] for step, times in result["first_batch_s"].items()}
  held = result["resident_mib"]
  waited = ", ".join(f"{seconds:.2f} s at step {step:,}" for step, seconds in first.items())
  return (
    f"Until the first batch: {waited}, medians. Resident memory over a long stretch of batches:"
    f" {min(held):.0f} to {max(held):.0f} MiB."
  )


# --- all of it -------------------------------------------------------------------------------


def measure(data_dir: pathlib.Path, rounds: int) -> dict[str, Any]:
  """All figures, printed as they come."""
  source = tfds_sources.load(generated_images.NAME, str(data_dir), _SIZE)
  number, classes = len(source.train_labels), len(np.unique(source.train_labels))
  found: dict[str, Any] = {"images": number, "classes": classes, "batch": _BATCH, "size": _SIZE}
  found["stages_cpu_ms"] = result = stages(source.train_images, data_dir, 3 * rounds)
  for name, times in result.items():
    print(f"{name:<32}{times['median']:8.3f} ms CPU", flush=True)
  found["shortcuts"] = shortcuts(rounds)
  for name, way in found["shortcuts"].items():
    changes = f"{way['share_changed']:.0%} of crops by {way['mean_difference']:.2f} of 255"
    print(f"{name:<32}{way['ms']['median']:8.3f} ms CPU, changes {changes}", flush=True)

  seconds = _interleave(
    {str(step): functools.partial(first_batch, source, step) for step in (0, _LATE)}, 3 * rounds
  )
  found["first_batch_s"] = {step: _summary(values) for step, values in seconds.items()}
  for step, values in found["first_batch_s"].items():
    print(f"{'first batch at step ' + step:<32}{values['median']:8.2f} s", flush=True)

  variants = {
    f"{config.num_workers} workers, {config.num_threads} threads": functools.partial(
      throughput, source, config, 8
    )
    for config in (StreamConfig(t, w, 2) for w in _WORKERS for t in _THREADS)
  } | {"evaluation views, 8 threads": functools.partial(views, source.test_images)}
  found["throughput"] = {}
  for name, runs in _interleave(variants, rounds).items():
    found["throughput"][name] = {key: _summary([run[key] for run in runs]) for key in runs[0]}
    medians = {key: values["median"] for key, values in found["throughput"][name].items()}
    print(f"{name:<32}{medians['per_s']:8.0f} images/s, {medians['per_cpu_s']:.0f} per CPU second")

  found["waits"] = [waits(source, 12) for _ in range(rounds)]
  for load in _LOADS:
    runs = [run[f"{load:g}"] for run in found["waits"]]
    words = (f"{run['wait_share']:.1%} ({run['load_by_both']:.2f})" for run in runs)
    print(f"waits at load {load:g}, each run and its load by decoding before and after:", *words)
  found["resident_mib"] = memory(source, 160)
  print("resident, MiB", " ".join(f"{x:.0f}" for x in found["resident_mib"]))
  return found | timing.environment()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data_dir", type=pathlib.Path, help="where the set is kept")
  parser.add_argument("--gigabytes", type=float, default=2, help="of images")
  parser.add_argument("--json", type=pathlib.Path, help="write versions, hardware and all figures")
  parser.add_argument("--rounds", type=int, default=5, help="repeats of every measurement")
  arguments = parser.parse_args()
  with contextlib.ExitStack() as stack:
    folder = arguments.data_dir or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    generated_images.prepare_set(folder, arguments.gigabytes)
    result = measure(folder, arguments.rounds)
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
