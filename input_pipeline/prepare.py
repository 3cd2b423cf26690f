"""Downloads a data set and makes it ready: python -m input_pipeline.prepare --dataset=cifar100

Training itself never downloads. Sets are stored by TensorFlow Datasets as array_record files, which
needs TensorFlow here and nowhere else; large sets get an index of labels and names beside them. Run
again, it does only what is missing.
"""

import argparse
import sys

from input_pipeline import tfds_sources
from memdiff.errors import DataError, exit_code


def prepare(name: str, data_dir: str) -> None:
  """Downloads and indexes the set `name`, saying what it does.

  Raises:
    DataError: if the download or the writing fails.
  """
  builder = tfds_sources.make_builder(name, data_dir)
  if builder.is_prepared():
    print(f"{name} is already in {builder.data_path}", flush=True)
  else:
    _need_tensorflow()
    print(f"downloading {name} to {builder.data_path}", flush=True)
    try:
      builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # TFDS raises many types: network, disk, manual downloads
      raise DataError(f"Cannot prepare {name}: {tfds_sources.one_line(error)}") from error
  tfds_sources.prepared_builder(name, data_dir)  # of another file format: says so
  if tfds_sources.SETS[name].streamed and not _has_index(name, builder):
    print("writing the index of labels and names", flush=True)
    tfds_sources.write_index(name, builder, _progress)
  for part, split in tfds_sources.splits(name).items():
    print(f"{part}: {builder.info.splits[split].num_examples:,} examples", flush=True)
  place = f" --config.dataset.data_dir={data_dir}" if data_dir else ""
  print(f"ready; train with --config.dataset.name={name}{place}")


def _has_index(name: str, builder) -> bool:
  try:
    tfds_sources.read_index(name, builder)
  except DataError:
    return False
  return True


def _need_tensorflow() -> None:
  try:
    import tensorflow  # noqa: F401
  except ImportError:
    raise DataError(
      "Preparing a data set needs TensorFlow, which TFDS writes through; install tensorflow-cpu"
      " (training does not need it)."
    ) from None


def _progress(split: str, done: int, total: int) -> None:
  print(f"\r  {split}: {done:,} of {total:,}", end="\n" if done == total else "", flush=True)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--dataset", required=True, choices=tfds_sources.SETS)
  parser.add_argument("--data_dir", default="", help="where TFDS keeps its sets; default: TFDS's")
  arguments = parser.parse_args(argv)
  return exit_code(lambda: prepare(arguments.dataset, arguments.data_dir))


if __name__ == "__main__":
  sys.exit(main())
