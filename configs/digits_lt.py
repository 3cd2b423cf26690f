"""Long-tailed digits: 8x8 images that come with scikit-learn, no download.

  python main.py --config=configs/digits_lt.py --workdir=runs/digits_lt

About two minutes on two CPU cores. Variants, as in --config=configs/digits_lt.py:smoke:
  default   five seeds
  smoke     two seeds and a few steps of everything, for tests: runs in seconds, learns little
"""

from ml_collections import ConfigDict


def get_config(variant: str = "default") -> ConfigDict:
  config = ConfigDict()
  config.name = "digits_lt"
  config.seeds = (0, 1, 2, 3, 4)  # initialisation and training; all run at once

  config.dataset = ConfigDict()
  config.dataset.name = "digits"
  config.dataset.profile = "exponential"  # exponential | step, images per class as LDAM has it
  config.dataset.imbalance = 50.0  # images of the largest class / of the smallest
  config.dataset.split_seed = 0  # which images the tail keeps; 0 is the field's standard

  config.encoder = ConfigDict()
  config.encoder.backbone = ConfigDict()
  config.encoder.backbone.stage_sizes = (1, 1, 1)  # residual blocks per stage
  config.encoder.backbone.widths = (16, 32, 64)  # channels per stage; the last is the feature size
  config.encoder.loss = "csl"  # csl | cross_entropy: the encoder everything else builds on
  config.encoder.references = ("cross_entropy",)  # further losses, trained as rows of the table
  config.encoder.beta = 0.9999  # effective number: 0 weighs classes alike, 1 by 1 / count
  config.encoder.defer = 0.8  # share of the steps before the class weights set in
  config.encoder.shift = 1  # random shift of the images, pixels each way
  config.encoder.batch_size = 64  # images
  config.encoder.num_steps = 1000
  config.encoder.optimizer = ConfigDict()
  config.encoder.optimizer.name = "sgd"  # sgd | adamw
  config.encoder.optimizer.learning_rate = 0.05  # peak, after warm-up; cosine decay to 0
  config.encoder.optimizer.momentum = 0.9  # Nesterov momentum of sgd, b1 of adamw
  config.encoder.optimizer.weight_decay = 5e-4  # L2 in sgd, decoupled in adamw
  config.encoder.optimizer.warmup = 0.05  # share of the steps
  config.encoder.optimizer.clip_norm = 0.0  # cap of the gradient norm; 0: none

  config.memory_bank = ConfigDict()
  config.memory_bank.num_slots = 32  # stored features per class
  config.memory_bank.horizon = 1000  # features until the mean becomes an exponential average

  config.diffusion = ConfigDict()
  config.diffusion.schedule = ConfigDict()
  config.diffusion.schedule.name = "cosine"  # cosine | linear
  config.diffusion.schedule.num_steps = 1000  # T
  config.diffusion.denoiser = ConfigDict()
  config.diffusion.denoiser.width = 256  # hidden units
  config.diffusion.denoiser.num_blocks = 3  # residual blocks
  config.diffusion.denoiser.embedding_dim = 64  # of time, class and conditioning
  config.diffusion.denoiser.num_heads = 4  # of the attention over stored features
  config.diffusion.class_exponent = 0.5  # classes drawn by count^this: 1 as they are, 0 balanced
  config.diffusion.prediction = "v"  # v | eps | x0, what the denoiser predicts
  config.diffusion.label_dropout = 0.1  # share of samples trained without label and memory
  config.diffusion.anonymous = 0.5  # share of the others trained without label, with memory
  config.diffusion.displacement = 1.0  # anonymous classes are moved by this x class differences
  config.diffusion.ema_decay = 0.999  # of the weights that sample
  config.diffusion.batch_size = 128  # features
  config.diffusion.num_steps = 2000
  config.diffusion.optimizer = ConfigDict()
  config.diffusion.optimizer.name = "adamw"
  config.diffusion.optimizer.learning_rate = 1e-3
  config.diffusion.optimizer.momentum = 0.9
  config.diffusion.optimizer.weight_decay = 0.01
  config.diffusion.optimizer.warmup = 0.05
  config.diffusion.optimizer.clip_norm = 1.0

  config.hallucination = ConfigDict()
  config.hallucination.tail_below = 100  # classes with fewer training images are filled ...
  config.hallucination.fill_to = 122  # ... with synthetic features up to this number
  config.hallucination.sampler = "ddim"  # ddpm | ddpm_beta | ddim | dpm++
  config.hallucination.num_steps = 50  # denoiser calls per sample
  config.hallucination.condition = "memory"  # memory | class_and_memory | class
  config.hallucination.guidance = 1.0  # 1: none; above: towards the class
  config.hallucination.x0_limit = 8.0  # clips predicted features, standard deviations; None: not
  config.hallucination.chunk_size = 1024  # samples at a time, bounds the memory
  config.hallucination.confidence = "cosine"  # cosine | certainty | entropy_literal | probability
  config.hallucination.confidence_power = 1.0  # above 1: trust only the best
  config.hallucination.normalize_confidence = True  # to mean 1 within each class

  config.head = ConfigDict()
  config.head.start = "encoder"  # encoder: go on from its head | zeros
  config.head.beta = 0.9999  # effective number, as in the encoder
  config.head.gamma_counts = "effective"  # gamma from: effective (real + trusted synthetic) | real
  config.head.defer = 0.0  # share of the steps before the class weights set in
  config.head.batch_size = 128  # real features
  config.head.added_batch_size = 128  # synthetic features beside them
  config.head.num_steps = 1000
  config.head.optimizer = ConfigDict()
  config.head.optimizer.name = "sgd"
  config.head.optimizer.learning_rate = 0.05
  config.head.optimizer.momentum = 0.9
  config.head.optimizer.weight_decay = 5e-4
  config.head.optimizer.warmup = 0.05
  config.head.optimizer.clip_norm = 0.0

  config.evaluation = ConfigDict()
  config.evaluation.map_per_class = 60  # points per class and kind in the t-SNE picture

  config.loop = ConfigDict()
  config.loop.steps_per_dispatch = 50  # steps per call of the compiled program
  config.loop.eval_every = 100  # steps
  config.loop.checkpoint_every = 500  # steps; a killed run loses at most these
  config.loop.keep_checkpoints = 2

  if variant == "smoke":
    config.seeds = (0, 1)
    config.encoder.num_steps = 30
    config.diffusion.num_steps = 40
    config.diffusion.denoiser.width = 32
    config.head.num_steps = 30
    config.hallucination.num_steps = 5
    config.loop.steps_per_dispatch = 5
    config.loop.eval_every = 10
    config.loop.checkpoint_every = 10
  elif variant != "default":
    raise ValueError(f"unknown variant {variant!r}; the variants are default and smoke.")
  return config
