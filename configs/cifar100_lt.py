"""CIFAR-100-LT with a ResNet-32: one command per row of the field's table.

  python -m input_pipeline.prepare --dataset=cifar100 --data_dir=DIR      (once)
  python main.py --config=configs/cifar100_lt.py --workdir=runs/c100 \\
    --config.dataset.data_dir=DIR --config.dataset.imbalance=100 --config.classifier.loss=ldam_drw

Variants, as in --config=configs/cifar100_lt.py:proco
  default  the LDAM recipe: 200 epochs, batch 128, crop and flip
  proco    the ProCo recipe: 400 epochs, batch 256, AutoAugment and Cutout
  memdiff  the LDAM recipe, then memory bank, denoiser, hallucinated features and heads
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  make = base.memdiff if variant == "memdiff" else base.classification
  config = make("cifar100_lt")
  config.dataset.name = "cifar100"
  base.choose(variant, {"proco": lambda: base.proco_recipe(config), "memdiff": lambda: None})
  return config
