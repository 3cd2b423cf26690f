"""Generates long-tailed digits: 8x8 images that come with scikit-learn, no download.

  python main.py --config=configs/images/digits_lt.py --workdir=runs/digits_images

A few minutes on two CPU cores. Variants, as in --config=configs/images/digits_lt.py:full:
  default  four methods, one seed
  full     all methods, three seeds, two guidance scales: takes far longer
  smoke    few steps of everything, for tests: seconds, learns little
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.images("digits_images")
  config.seeds = (0,)
  config.dataset.name = "digits"
  config.dataset.imbalance = 50.0
  config.methods = ("ddpm", "balanced", "coral", "memdiff+balanced")
  base.small_images(config)
  config.diffusion.unet.update(channels=16, multipliers=(1, 2), num_blocks=1, attention=(4,))
  config.diffusion.num_steps = 600
  config.sampling.per_class = 100
  config.evaluation.kid_size = 500
  config.encoder.backbone.name = "resnet8"
  config.classifier.augment.padding = 1
  config.classifier.num_epochs = 20.0
  config.loop.eval_every = 200

  def full():
    config.seeds = (0, 1, 2)
    config.diffusion.num_steps = 1000
    base.all_methods(config)
    config.sampling.guidance = (1.0, 2.0)

  def smoke():
    config.methods = ("ddpm", "coral+t2h")
    config.diffusion.unet.channels = 8
    config.diffusion.num_steps = 20
    config.classifier.num_epochs = 1.0
    config.sampling.update(num_steps=3, per_class=5, chunk_size=20, guidance=(1.0, 2.0))
    config.evaluation.kid_size = 20
    config.loop.steps_per_dispatch = 5
    config.loop.eval_every = 10
    config.loop.checkpoint_every = 10

  base.choose(variant, {"full": full, "smoke": smoke})
  return config
