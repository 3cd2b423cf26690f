"""Places-LT with a ResNet-50 at 224 px, streamed from disk.

  python -m input_pipeline.prepare --dataset=places --data_dir=DIR      (once)
  python main.py --config=configs/places_lt.py --workdir=runs/places_lt \\
    --config.dataset.data_dir=DIR --config.dataset.list_path=Places_LT_train.txt

The list is the official one of Liu et al. 2019 (OLTR), a line per image such as
"train/airfield/00004851.jpg 0". The field starts from ImageNet weights; if you have them:
--config.encoder.init_from=resnet50.safetensors --config.encoder.init_head=False
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.classification("places_lt")
  base.imagenet_recipe(config)
  config.dataset.name = "places"
  config.dataset.profile = "list"
  config.dataset.list_path = "Places_LT_train.txt"
  config.classifier.num_epochs = 30.0
  base.choose(variant, {})
  return config
