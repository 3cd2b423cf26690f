"""Food101-LT, exponential, with a ResNet-18 at 224 px, streamed from disk.

python -m input_pipeline.prepare --dataset=food101 --data_dir=DIR      (once)
python main.py --config=configs/food101_lt.py --workdir=runs/food --config.dataset.data_dir=DIR
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.classification("food101_lt")
  base.imagenet_recipe(config)
  config.dataset.name = "food101"
  config.encoder.backbone.name = "resnet18"
  base.choose(variant, {})
  return config
