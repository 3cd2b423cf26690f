"""What hallucination adds on CIFAR-100-LT when nothing else changes: a fixed encoder, every method.

  python -m benchmarks.isolating --config=configs/isolating_cifar100_lt.py:foreign --json FILE \\
    --config.dataset.data_dir=DIR --config.encoder.init_from=FILE

Variants (default: foreign):
  foreign    a CIFAR-10 ResNet-32 (akamaster), which saw none of these images; stage 2 on a 2 x 2
             grid and stage 3 averaged, 192 numbers
  memorised  LDMLR's ResNet-32, trained on this very split until it knew its images by heart; needs
             --config.dataset.list_path=FILE:CIFAR100_LT001, the indices of that split
  ldmlr      foreign with LDMLR's two rows beside memdiff, three seeds, at a fifth of their training
             steps; for a GPU, since their U-Net takes days on two cores
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  variant = "foreign" if variant == "default" else variant
  config = base.memdiff(f"isolating_cifar100_lt_{variant}")
  config.seeds = (0, 1, 2, 3, 4)  # banks, generators and heads; the encoder is one
  config.dataset.name = "cifar100"
  config.classifier.loss = "cross_entropy"
  config.classifier.references = ()
  config.classifier.num_epochs = 0.0
  config.selection.encoder = "frozen"
  config.generators.names = (
    "duplicate", "kernel_jitter", "feature_mixup", "gaussian_diagonal", "gaussian_shared",
    "gaussian_shrunk", "gaussian_shrunk_means", "distribution_calibration", "fasa", "class_only",
    "memdiff",
  )  # fmt: skip
  config.head.losses = ("cross_entropy", "balanced_softmax", "logit_adjustment", "csl")
  config.generators.fill_to = (20, 100)
  config.hallucination.start = (0.25, 0.5, 1.0)
  config.head.exponents = (1.0, 0.5)
  config.head.training.num_steps = 500
  config.selection.folds = 3

  def foreign():
    config.encoder.backbone.taps = ("2:2", "3:1")
    config.encoder.init_head = False
    config.encoder.input.mean = (0.485, 0.456, 0.406)
    config.encoder.input.std = (0.229, 0.224, 0.225)
    config.head.training.start = "zeros"
    config.head.training.optimizer.learning_rate = 0.1

  def memorised():
    config.dataset.profile = "list"
    config.encoder.input.mean = (0.5071, 0.4867, 0.4408)
    config.encoder.input.std = (0.2675, 0.2565, 0.2761)
    # Not with a head that knows what folds hold out. The encoder knows these images by heart as
    # well, so that folds say little here.
    config.head.training.start = "zeros"

  def ldmlr():
    foreign()
    config.seeds = (0, 1, 2)  # as many as folds, so that both train by one program
    config.generators.names = ("memdiff", "ldmlr", "ldmlr_published")
    config.generators.ldmlr_share = 0.2

  base.choose(variant, {"foreign": foreign, "memorised": memorised, "ldmlr": ldmlr})
  return config
