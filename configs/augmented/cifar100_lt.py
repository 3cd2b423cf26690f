"""What generated images are worth to a ResNet-32 on CIFAR-100-LT; for accelerators.

  python -m input_pipeline.prepare --dataset=cifar100 --data_dir=DIR      (once)
  python main.py --config=configs/augmented/cifar100_lt.py --workdir=runs/augmented100 \\
    --config.dataset.data_dir=DIR

200 epochs of the field's standard recipe; U-Nets of 50,000 steps, a third of the papers' budget.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.augmented("augmented_cifar100")
  config.seeds = (0, 1, 2)
  config.dataset.name = "cifar100"
  config.methods = ("ddpm", "balanced", "cbdm", "coral", "t2h", "memdiff+balanced")
  config.pool.filters = ("none", "confident", "diffult", "agreeing&new")
  config.diffusion.num_steps = 50_000
  config.diffusion.unet.dtype = "bfloat16"
  config.encoder.backbone.name = "resnet32"
  config.selection.folds = 3
  base.choose(variant, {})
  return config
