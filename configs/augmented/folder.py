"""What generated images are worth to a classifier of your own: DIR/train/CLASS/*, DIR/test/CLASS/*.

  python main.py --config=configs/augmented/folder.py --workdir=runs/mine \\
    --config.dataset.data_dir=DIR

Images are resized to 32 pixels. DIR/CLASS/*.jpg alone needs --config.dataset.test_share=0.2.
Folds of the training images say beforehand whether generated images help. Variants:
  default  the U-Net of the papers, for an accelerator
  small    a small U-Net, for CPUs
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.augmented("augmented_folder")
  config.seeds = (0, 1, 2)  # as many as folds, so that both train by one program
  config.dataset.name = "folder"
  config.dataset.profile = "natural"
  config.dataset.image_size = 32
  config.methods = ("balanced", "memdiff+balanced")
  config.diffusion.num_steps = 50_000
  config.diffusion.unet.dtype = "bfloat16"
  config.encoder.backbone.name = "resnet20"
  config.classifier.batch_size = 32
  config.classifier.num_epochs = 60.0
  config.selection.folds = 3

  def small():
    base.small_folder_images(config)
    config.classifier.augment.flip = True

  base.choose(variant, {"small": small})
  return config
