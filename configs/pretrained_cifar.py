"""Published CIFAR encoders, scored as they are: a PyTorch state dict in, a report out.

  python main.py --config=configs/pretrained_cifar.py:akamaster_resnet32 --workdir=runs/akamaster \\
    --config.dataset.data_dir=DIR --config.encoder.init_from=resnet32.npz

Variants (default: akamaster_resnet32):
  akamaster_resnet20, akamaster_resnet32  trained on all of CIFAR-10: 91.7 and 92.6 % are published
  ldmlr_cifar100, ldmlr_cifar10           trained on CIFAR-LT at imbalance 100 with cross-entropy
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  variant = "akamaster_resnet32" if variant == "default" else variant
  config = base.classification(variant)
  config.seeds = (0,)
  config.classifier.num_epochs = 0.0

  def akamaster(name):
    config.dataset.name = "cifar10"
    config.dataset.profile = "natural"
    config.encoder.backbone.name = name
    config.encoder.input.mean = (0.485, 0.456, 0.406)
    config.encoder.input.std = (0.229, 0.224, 0.225)

  def ldmlr(name, channels):
    config.dataset.name = name
    config.encoder.input.mean = (0.5071, 0.4867, 0.4408)
    config.encoder.input.std = (0.2675, 0.2565, 0.2761)
    config.encoder.input.channels = channels
    config.decoupled.methods = ("logit_adjustment", "tau_norm", "ncm")

  base.choose(
    variant,
    {
      "akamaster_resnet20": lambda: akamaster("resnet20"),
      "akamaster_resnet32": lambda: akamaster("resnet32"),
      "ldmlr_cifar100": lambda: ldmlr("cifar100", "rgb"),
      "ldmlr_cifar10": lambda: ldmlr("cifar10", "bgr"),
    },
  )
  return config
