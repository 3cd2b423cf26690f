"""Generates images of CIFAR-10-LT as in the papers; for accelerators.

  python -m input_pipeline.prepare --dataset=cifar10 --data_dir=DIR      (once)
  python main.py --config=configs/images/cifar10_lt.py:coral --workdir=runs/coral10 \\
    --config.dataset.data_dir=DIR

150,000 steps of 128 images (CORAL's budget), 50,000 images. Variants: a method, or several joined
by +, as ddpm (the default), cbdm, coral, coral_code, t2h+balanced; all of them trains every one.
FD needs a network: by default a ResNet-32 that is trained on all of CIFAR-10.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.cifar_images("cifar10_lt_images", "cifar10", variant)
  config.sampling.per_class = 5000
  return config
