"""Long-tailed digits: 8x8 images that come with scikit-learn, no download.

  python main.py --config=configs/digits_lt.py --workdir=runs/digits_lt

A few minutes on two CPU cores. Variants, as in --config=configs/digits_lt.py:full:
  default         the whole of memdiff in small: three seeds, one generator beside it
  full            five seeds, six generators, encoders trained with two losses: takes longer
  smoke           two seeds and a few steps of everything, for tests: seconds, learns little
  classification  classifiers alone, with the decoupled heads
  joint           encoder and head trained together, too; no recommendation
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  make = base.classification if variant == "classification" else base.memdiff
  config = make("digits_lt")
  config.seeds = (0, 1, 2, 3, 4)
  config.dataset.name = "digits"
  config.dataset.imbalance = 50.0
  config.encoder.backbone.name = "resnet8"
  config.classifier.augment.padding = 1
  config.classifier.augment.flip = False
  config.classifier.batch_size = 64
  config.classifier.num_epochs = 190.5  # 1000 steps
  config.classifier.optimizer = base.nesterov_cosine(0.05, 5e-4)
  config.loop.eval_every = 100
  config.loop.checkpoint_every = 500

  def classification():
    config.classifier.loss = "cross_entropy"
    config.classifier.references = ("csl", "balanced_softmax", "ldam_drw")
    config.decoupled.methods = ("logit_adjustment", "tau_norm", "ncm", "crt", "lws")

  def smoke():
    config.seeds = (0, 1)
    config.classifier.references = ()
    config.classifier.num_epochs = 5.7  # 30 steps
    config.diffusion.num_steps = 40
    config.diffusion.denoiser.width = 32
    config.head.training.num_steps = 30
    config.hallucination.num_steps = 5
    config.selection.folds = 2
    config.selection.encoder = "frozen"
    config.head.training.start = "zeros"  # as frozen folds ask
    config.head.l2, config.head.taus = (5e-4,), (1.0,)
    config.generators.names = ("kernel_jitter", "memdiff")
    config.evaluation.map_per_class = 5
    config.loop.steps_per_dispatch = 5
    config.loop.eval_every = 10
    config.loop.checkpoint_every = 10

  if variant != "classification":
    config.generators.fill_to = (122,)
    config.head.training.num_steps = 500
    config.selection.folds = 3

  def small():
    config.seeds = (0, 1, 2)
    config.classifier.loss = "cross_entropy"
    config.classifier.references = ()
    config.classifier.batch_size = 32
    config.classifier.num_epochs = 38.1  # 400 steps
    config.diffusion.denoiser.update(width=128, num_blocks=1, embedding_dim=32)
    config.diffusion.num_steps = 400  # too few for samples from noise alone ...
    config.hallucination.start = (0.25, 0.1)  # ... so they begin at noised exemplars
    config.generators.names = ("kernel_jitter", "memdiff")
    config.head.training.batch_size = 128
    config.head.training.num_steps = 300

  def full():
    config.generators.names = (
      "duplicate", "kernel_jitter", "feature_mixup", "gaussian_shared", "class_only", "memdiff",
    )  # fmt: skip

  def joint():
    config.classifier.references = ("balanced_softmax", "logit_adjustment")
    config.generators.names = ("kernel_jitter", "memdiff")
    config.head.losses = ("balanced_softmax", "csl")
    config.diffusion.num_steps = 1000
    config.selection.folds = 0
    config.joint.generators = ("real", "kernel_jitter", "memdiff")

  variants = {"classification": classification, "full": full, "smoke": smoke, "joint": joint}
  if variant == "default":
    small()
  base.choose(variant, variants)
  return config
