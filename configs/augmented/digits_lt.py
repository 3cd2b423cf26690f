"""What generated images are worth to a classifier of long-tailed digits; no download.

  python main.py --config=configs/augmented/digits_lt.py --workdir=runs/augmented

Minutes on two CPU cores. Variants, as in --config=configs/augmented/digits_lt.py:full:
  default  one generator, one loss, three seeds, three folds
  full     the whole table: seven generators, three losses; hours
  smoke    few steps of everything, for tests: seconds, learns little
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.augmented("augmented_digits")
  config.seeds = (0, 1, 2)  # as many as folds, so that both train by one program
  config.dataset.name = "digits"
  config.dataset.imbalance = 50.0
  config.methods = ("balanced",)
  config.losses = ("balanced_softmax",)
  config.controls = ("real", "oversampling", "affine")
  config.selection.folds = 3
  base.small_images(config)
  config.diffusion.unet.update(channels=16, multipliers=(1, 2), num_blocks=1, attention=(4,))
  config.diffusion.num_steps = 1000
  config.encoder.backbone.name = "resnet8"
  config.classifier.augment.padding = 1
  config.classifier.num_epochs = 40.0

  def full():
    config.methods = (
      *("ddpm", "balanced", "cbdm", "coral", "t2h"),
      *("memdiff+balanced", "memdiff+balanced+varied"),
    )
    config.added.counts = ("real", "effective")
    config.losses = ("cross_entropy", "balanced_softmax", "logit_adjustment")
    config.controls = ("real", "oversampling", "affine", "strong", "mixup")
    config.pool.filters = ("none", "confident", "diffult@0.3")

  def smoke():
    config.seeds = (0,)
    config.selection.folds = 2
    config.methods = ("ddpm", "memdiff+balanced")
    config.losses = ("cross_entropy", "logit_adjustment")
    config.controls = ("real", "oversampling", "affine", "elastic", "mixup")
    config.pool.filters = ("none", "confident", "agreeing&new")
    config.diffusion.unet.channels = 8
    config.diffusion.num_steps = 20
    config.classifier.num_epochs = 4.0
    config.sampling.update(num_steps=3, chunk_size=100)
    config.loop.steps_per_dispatch = 5
    config.loop.eval_every = 10
    config.loop.checkpoint_every = 10

  base.choose(variant, {"full": full, "smoke": smoke})
  return config
