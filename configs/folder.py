"""A folder of images of your own: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg.

  python main.py --config=configs/folder.py --workdir=runs/mine --config.dataset.data_dir=DIR

DIR/val (or valid, validation) is the test set if there is no DIR/test, and held out for selection
if there is. Of DIR/CLASS/*.jpg alone, dataset.test_share=0.2 splits a test set off. The classes
keep the images they have. Variants:
  default  a ResNet-32 on 32 px images
  large    a ResNet-18 on 224 px images; start it from ImageNet weights if you have them:
           --config.encoder.init_from=resnet18.safetensors --config.encoder.init_head=False
  memdiff  as default, then hallucinated features for the classes with fewer than 100 images
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  make = base.memdiff if variant == "memdiff" else base.classification
  config = make("folder")
  config.dataset.name = "folder"
  config.dataset.profile = "natural"
  config.dataset.image_size = 32

  def large():
    base.imagenet_recipe(config)
    config.encoder.backbone.name = "resnet18"
    config.classifier.augment.padding = 28  # of sets in memory; larger ones get resized crops too

  base.choose(variant, {"large": large, "memdiff": lambda: None})
  return config
