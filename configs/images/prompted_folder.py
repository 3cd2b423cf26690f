"""What images of a text-to-image model are worth to a classifier of your own images.

  pip install --no-deps -r requirements-text-to-image.txt
  python main.py --config=configs/images/prompted_folder.py --workdir=runs/prompted \\
    --config.text_to_image.model=/models/sd3 --config.dataset.data_dir=DIR

DIR holds train/CLASS/* and test/CLASS/*; DIR/CLASS/* alone needs --config.dataset.test_share=0.2.
The model is a folder as KerasHub saves Stable Diffusion 3 or 3.5; or as diffusers saves 1.5, 2.1 or
XL, with requirements-text-to-image-torch.txt. It is asked for images of rare
classes by their names, or by captions (--config.text_to_image.prompts.source=captions). Variants:
  default  64 pixels, for an accelerator
  smoke    few steps of everything, for tests
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.augmented("prompted_folder")
  config.seeds = (0, 1, 2)  # as many as folds, so that both train by one program
  config.dataset.name = "folder"
  config.dataset.profile = "natural"
  config.dataset.image_size = 64
  config.methods = ()
  config.text_to_image.prompts.contexts = ("", "outdoors", "close up", "from a distance")
  config.text_to_image.prompts.templates = ("a photo of a {class} {context}",)
  config.text_to_image.side = 512
  config.added.counts = ("real", "effective")
  config.encoder.backbone.name = "resnet20"
  config.classifier.batch_size = 32
  config.classifier.num_epochs = 60.0
  config.selection.folds = 3

  def smoke():
    base.few_steps(config)
    config.pool.update(filters=("none",), fill_to=0, surplus=1.0)
    config.text_to_image.update(side=0, num_steps=3, dtype="float32")

  base.choose(variant, {"smoke": smoke})
  return config
