"""What generated images are worth if there are many rare classes: Omniglot, 14 to 1 drawings.

  python -m benchmarks.unseen_classes prepare --images=DIR --out=DIR2      (once)
  python main.py --config=configs/augmented/omniglot_lt.py --workdir=runs/augmented_omniglot \\
    --config.dataset.data_dir=DIR2

DIR holds ALPHABET/CHARACTER/*.png, as Omniglot is published. A generator that looks at exemplars
may learn from common characters how any of them varies. Hours on two cores.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.augmented("augmented_omniglot")
  config.seeds = (0, 1, 2)
  config.dataset.name = "folder"
  config.dataset.imbalance = 14.0
  config.dataset.image_size = 14
  config.dataset.grey = True
  config.methods = ("balanced", "memdiff+balanced", "memdiff+balanced+varied")
  config.controls = ("real", "oversampling", "affine", "elastic", "strong", "mixup")
  config.added.counts = ("real", "effective")
  base.small_images(config)
  config.diffusion.unet.update(channels=24, multipliers=(1, 2), num_blocks=1, attention=(7,))
  config.diffusion.memory.hidden = 0.5
  config.diffusion.num_steps = 3000
  config.encoder.backbone.name = "resnet8"
  config.classifier.augment.padding = 1
  config.classifier.num_epochs = 100.0
  config.selection.folds = 2
  base.choose(variant, {})
  return config
