"""CIFAR-10-LT with a ResNet-32; configs/cifar100_lt.py has the commands and the variants."""

from ml_collections import ConfigDict

from configs import cifar100_lt


def get_config(variant: str = "default") -> ConfigDict:
  config = cifar100_lt.get_config(variant)
  config.name = "cifar10_lt"
  config.dataset.name = "cifar10"
  if variant == "memdiff":
    config.generators.tail_below = 500
    config.generators.fill_to = (500,)
  return config
