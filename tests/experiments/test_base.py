"""What kinds of experiment share: their checks, and the numbers that a finished stage leaves."""

import json

import pytest

from configs import digits_lt
from configs.augmented import digits_lt as augmented_digits
from configs.images import digits_lt as image_digits
from input_pipeline import dataset
from memdiff import pipeline
from memdiff.errors import ConfigError
from memdiff.experiments import base, images


@pytest.mark.parametrize("make", [digits_lt.get_config, augmented_digits.get_config])
def test_examples_that_would_be_held_out_for_nothing_are_refused(make):
  config = make()
  config.dataset.holdout = 0.2
  with pytest.raises(ConfigError, match=r"holdout is 0\.2, but .* cross-validation .* to 0"):
    pipeline.prepare(config.to_dict())


def test_held_out_images_of_a_folder_that_are_not_used_are_said(capsys):
  config = digits_lt.get_config("classification")
  config.dataset.holdout = 0.2
  data = dataset.load(pipeline.settings_of(config.to_dict()).dataset)
  base.check_nothing_held_out(pipeline.settings_of(digits_lt.get_config().to_dict()), data)
  said = capsys.readouterr().err
  assert f"the {len(data.holdout_labels)} held-out images are not used" in said


def test_metrics_that_are_not_numbers_can_be_written_to_a_manifest(tmp_path):
  records = [
    {"step": 1, "kind": "train", "metrics": {"loss": [1.0, 3.0]}},
    {"step": 1, "kind": "eval", "metrics": {"intra_cosine": [float("nan"), 0.5]}},
  ]
  lines = "".join(json.dumps(record) + "\n" for record in records)
  (tmp_path / "metrics.jsonl").write_text(lines)
  found = base.last_metrics(tmp_path)
  assert found == {"train_loss": 2.0, "eval_intra_cosine": None}
  json.dumps(found, allow_nan=False)


def test_what_judges_images_decides_neither_their_training_nor_their_drawing():
  settings = pipeline.settings_of(image_digits.get_config().to_dict())
  phases = {phase.name: phase for phase in images.KIND.phases_of(settings)}
  names = list(phases)
  assert names.index("network") > names.index("sampling") > names.index("diffusion")
  read = {field for name in ("diffusion", "sampling") for field in phases[name].reads}
  assert not {"encoder", "classifier", "evaluation"} & read
