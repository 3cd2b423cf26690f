"""Generates images of Fashion-MNIST-LT: 28 pixels, a small U-Net and a short budget, for CPUs.

  python -m input_pipeline.prepare --dataset=fashion_mnist --data_dir=DIR      (once)
  python main.py --config=configs/images/fashion_mnist_lt.py --workdir=runs/fashion_images \\
    --config.dataset.data_dir=DIR

Variants: default (plain diffusion), all (every method).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.images("fashion_mnist_lt_images")
  config.seeds = (0,)
  config.dataset.name = "fashion_mnist"
  base.small_images(config)
  config.diffusion.unet.update(channels=24, multipliers=(1, 2, 2), num_blocks=1, attention=(7,))
  config.diffusion.batch_size = 32
  config.diffusion.num_steps = 2000
  config.sampling.per_class = 100
  config.evaluation.kid_size = 500
  config.encoder.backbone.name = "resnet8"
  config.classifier.num_epochs = 2.0
  base.choose(variant, {"all": lambda: base.all_methods(config)})
  return config
