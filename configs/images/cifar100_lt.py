"""Generates images of CIFAR-100-LT as in the papers; for accelerators.

  python -m input_pipeline.prepare --dataset=cifar100 --data_dir=DIR      (once)
  python main.py --config=configs/images/cifar100_lt.py:coral --workdir=runs/coral100 \\
    --config.dataset.data_dir=DIR

150,000 steps of 128 images (CORAL's budget), 50,000 images. Variants: a method, or several joined
by +, as ddpm (the default), cbdm, coral, coral_code, t2h+balanced; all of them trains every one.
FD needs a network: by default a ResNet-32 that is trained on all of CIFAR-100.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  return base.cifar_images("cifar100_lt_images", "cifar100", variant)
