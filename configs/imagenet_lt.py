"""ImageNet-LT with a ResNet-50 at 224 px, images streamed from disk.

  python -m input_pipeline.prepare --dataset=imagenet2012 --data_dir=DIR      (once)
  python main.py --config=configs/imagenet_lt.py --workdir=runs/imagenet_lt \\
    --config.dataset.data_dir=DIR --config.dataset.list_path=ImageNet_LT_train.txt

The list is the official one of Liu et al. 2019 (OLTR), a line per image such as
"train/n01440764/n01440764_190.JPEG 0".
Variants: default (ResNet-50, 90 epochs), resnet10, memdiff (the whole of memdiff, ResNet-50).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  make = base.memdiff if variant == "memdiff" else base.classification
  config = make("imagenet_lt")
  base.imagenet_recipe(config)
  config.dataset.name = "imagenet2012"
  config.dataset.profile = "list"
  config.dataset.list_path = "ImageNet_LT_train.txt"

  def resnet10():
    config.encoder.backbone.name = "resnet10"

  def memdiff():
    base.large_memdiff(config)

  base.choose(variant, {"resnet10": resnet10, "memdiff": memdiff})
  return config
