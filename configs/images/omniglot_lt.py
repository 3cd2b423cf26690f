"""Generates long-tailed handwritten characters: Omniglot, 14 to 1 drawings, for CPUs.

  python -m benchmarks.unseen_classes prepare --images=DIR --out=DIR2      (once)
  python main.py --config=configs/images/omniglot_lt.py --workdir=runs/omniglot \\
    --config.dataset.data_dir=DIR2

DIR holds ALPHABET/CHARACTER/*.png, as Omniglot is published. Whole alphabets are kept from
training: what `memdiff` draws of their characters, from a few exemplars,
`python -m benchmarks.unseen_classes judge` tells.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.images("omniglot_lt_images")
  config.seeds = (0,)
  config.dataset.name = "folder"
  config.dataset.imbalance = 14.0
  config.dataset.image_size = 28
  config.dataset.grey = True
  config.methods = ("ddpm", "balanced", "memdiff+balanced")
  base.small_images(config)
  config.diffusion.unet.update(channels=24, multipliers=(1, 2, 2), num_blocks=1, attention=(7,))
  config.diffusion.memory.hidden = 0.5
  config.diffusion.batch_size = 32
  config.diffusion.num_steps = 3000
  config.sampling.per_class = 5
  config.evaluation.kid_size = 500
  config.encoder.backbone.name = "resnet20"
  config.classifier.num_epochs = 40.0
  base.choose(variant, {})
  return config
