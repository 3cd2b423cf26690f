"""Fashion-MNIST-LT with a ResNet-20.

  python -m input_pipeline.prepare --dataset=fashion_mnist --data_dir=DIR      (once)
  python main.py --config=configs/fashion_mnist_lt.py --workdir=runs/fashion \\
    --config.dataset.data_dir=DIR

Variants: default (classifiers), memdiff (hallucinated features too).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  make = base.memdiff if variant == "memdiff" else base.classification
  config = make("fashion_mnist_lt")
  config.dataset.name = "fashion_mnist"
  config.encoder.backbone.name = "resnet20"
  config.classifier.augment.padding = 2
  config.classifier.num_epochs = 60.0
  if variant == "memdiff":
    config.generators.tail_below = 600
    config.generators.fill_to = (600,)
  base.choose(variant, {"memdiff": lambda: None})
  return config
