"""Images of rare classes from prompts, and what they are worth: emoji, 99 classes of 2 to 388.

  npm pack emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0
  pip install --no-deps -r requirements-prompts.txt
  python -m benchmarks.emoji --packages=. --out=DIR                          (once)
  python main.py --config=configs/images/prompted_emoji.py --workdir=runs/prompted_emoji \\
    --config.dataset.data_dir=DIR

A U-Net reads the captions of the training images, and draws images of rare classes from prompts:
captions of typical images, names of classes, or features of a classifier mapped to sentences.
Classifiers are then trained on real and generated images. 16 pixels; hours on two cores.
Variants:
  default  what the images are worth to a classifier
  quality  how good the images are; no classifier is trained on them
  smoke    few steps of everything, for tests: seconds, learns little
"""

from ml_collections import ConfigDict

from configs import base

_QUALITY = "quality"
_METHODS = ("balanced", "memdiff+balanced", "balanced+prompted", "balanced+prompted+by_name")


def get_config(variant: str = "default") -> ConfigDict:
  make = base.images if variant == _QUALITY else base.augmented
  config = make("prompted_emoji")
  config.seeds = (0, 1, 2)
  config.dataset.name = "folder"
  config.dataset.profile = "natural"
  config.dataset.image_size = 16
  base.small_folder_images(config)
  config.methods = _METHODS
  config.diffusion.mirror = False  # captions speak of left and right
  config.diffusion.unet.update(channels=32, multipliers=(1, 2), attention=(8,))
  config.sampling.prompts.templates = ("{class}",)
  config.encoder.backbone.name = "resnet20"
  config.classifier.num_epochs = 60.0
  if variant != _QUALITY:
    config.methods = (*_METHODS, "balanced+prompted+by_map")
    config.pool.fill_to = 40
    config.added.counts = ("real", "effective")
    config.selection.folds = 3

  def quality():
    config.sampling.per_class = 20
    config.evaluation.kid_size = 500

  def smoke():
    base.few_steps(config)
    config.pool.update(filters=("none",), fill_to=0)
    config.diffusion.unet.update(channels=8, multipliers=(1, 2), attention=())
    config.diffusion.num_steps = 20
    config.diffusion.tuning.num_steps = 10
    config.sampling.update(num_steps=3, chunk_size=20)

  base.choose(variant, {_QUALITY: quality, "smoke": smoke})
  return config
