"""iNaturalist 2018 as it is, 8,142 classes, with a ResNet-50 at 224 px, streamed from disk.

  python -m input_pipeline.prepare --dataset=i_naturalist2018 --data_dir=DIR      (once)
  python main.py --config=configs/inaturalist2018.py --workdir=runs/inat \\
    --config.dataset.data_dir=DIR

Variants: default, memdiff (the whole of memdiff; its bank is 17 GB, split over the devices).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  make = base.memdiff if variant == "memdiff" else base.classification
  config = make("inaturalist2018")
  base.imagenet_recipe(config)
  config.dataset.name = "i_naturalist2018"
  config.dataset.profile = "natural"
  config.classifier.optimizer.learning_rate = 0.2
  config.classifier.optimizer.weight_decay = 1e-4

  def memdiff():
    base.large_memdiff(config)
    config.generators.tail_below = 20  # the few-shot classes of the field's tables
    config.generators.fill_to = (20,)

  base.choose(variant, {"memdiff": memdiff})
  return config
