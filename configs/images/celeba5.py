"""Generates CelebA-5, faces with five hair colours, at 64 pixels; for accelerators.

  python -m input_pipeline.prepare --dataset=celeb_a --data_dir=DIR      (once)
  python main.py --config=configs/images/celeba5.py:coral --workdir=runs/celeba5_images \\
    --config.dataset.data_dir=DIR

Variants: a method, or several joined by +, ddpm by default; all of them trains every one. FD needs
a network: by default a ResNet-32 that is trained on the same faces.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.cifar_images("celeba5_images", "celeb_a", variant)
  config.dataset.profile = "natural"
  config.dataset.image_size = 64
  config.sampling.per_class = 2000
  config.classifier.num_epochs = 30.0
  return config
