"""Generates images of ImageNet-LT at 64 pixels; for accelerators.

  python -m input_pipeline.prepare --dataset=imagenet_lt --data_dir=DIR      (once)
  python main.py --config=configs/images/imagenet_lt.py:coral --workdir=runs/imagenet_lt_images \\
    --config.dataset.data_dir=DIR

115,846 images of 1,000 classes, 2 GB in memory; held against the balanced test set. Variants: a
method, or several joined by +, ddpm by default; all of them trains every one. FD needs a network:
the EfficientNet-Lite0 of requirements-images.txt.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.cifar_images("imagenet_lt_images", "imagenet_lt", variant)
  config.dataset.profile = "natural"
  config.dataset.image_size = 64
  config.diffusion.num_steps = 300_000
  config.sampling.per_class = 50
  config.evaluation.network = "efficientnet_lite0"
  config.evaluation.reference = "test"
  return config
