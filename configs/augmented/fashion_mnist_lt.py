"""What generated images are worth to a classifier of Fashion-MNIST-LT; a short budget, for CPUs.

  python -m input_pipeline.prepare --dataset=fashion_mnist --data_dir=DIR      (once)
  python main.py --config=configs/augmented/fashion_mnist_lt.py --workdir=runs/augmented_fashion \\
    --config.dataset.data_dir=DIR

28 pixels, imbalance 100. Every generator trains one U-Net per seed and fold. Hours on two cores.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.augmented("augmented_fashion_mnist")
  config.seeds = (0, 1, 2)
  config.dataset.name = "fashion_mnist"
  base.small_images(config)
  config.methods = ("balanced", "memdiff+balanced")
  config.diffusion.unet.update(channels=24, multipliers=(1, 2, 2), num_blocks=1, attention=(7,))
  config.diffusion.batch_size = 32
  config.diffusion.num_steps = 2000
  config.pool.fill_to = 500
  config.encoder.backbone.name = "resnet8"
  config.classifier.num_epochs = 20.0
  config.selection.folds = 3
  base.choose(variant, {})
  return config
