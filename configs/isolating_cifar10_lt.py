"""What hallucination adds on CIFAR-10-LT when nothing else changes: a fixed encoder, every method.

  python -m benchmarks.isolating --config=configs/isolating_cifar10_lt.py --json FILE \\
    --config.dataset.data_dir=DIR --config.encoder.init_from=FILE \\
    --config.dataset.list_path=FILE:CIFAR10_LT001

The encoder is LDMLR's ResNet-32, which was trained on this very split until it knew its images by
heart, and takes BGR. configs/isolating_cifar100_lt.py has the same for CIFAR-100-LT.
"""

from ml_collections import ConfigDict

from configs import base, isolating_cifar100_lt


def get_config(variant: str = "default") -> ConfigDict:
  base.choose(variant, {})
  config = isolating_cifar100_lt.get_config("memorised")
  config.name = "isolating_cifar10_lt_memorised"
  config.dataset.name = "cifar10"
  config.encoder.input.channels = "bgr"
  config.generators.tail_below = 500
  config.generators.fill_to = (200, 500)
  return config
