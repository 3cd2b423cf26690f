"""CelebA-5, five hair colours at natural frequencies (Kim et al. 2020); a ResNet-32 at 64 px.

python -m input_pipeline.prepare --dataset=celeb_a --data_dir=DIR      (once)
python main.py --config=configs/celeba5.py --workdir=runs/celeba5 --config.dataset.data_dir=DIR
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.classification("celeba5")
  base.imagenet_recipe(config)
  config.dataset.name = "celeb_a"
  config.dataset.profile = "natural"
  config.dataset.image_size = 64
  config.encoder.backbone.name = "resnet32"
  config.classifier.num_epochs = 30.0
  base.choose(variant, {})
  return config
