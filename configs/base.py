"""Every field of a config, with its unit or meaning; the other files here change what they need.

`classification` trains and scores image classifiers; `memdiff` goes on to the memory bank, the
denoiser, hallucinated features and heads trained with them. The values here are the field's
standard recipe for CIFAR-sized images (Cao et al. 2019, LDAM-DRW) and memdiff's defaults.
"""

from ml_collections import ConfigDict


def dataset() -> ConfigDict:
  config = ConfigDict()
  config.name = "cifar100"  # digits | folder | the TFDS sets that input_pipeline.prepare lists
  config.data_dir = ""  # where TFDS keeps its sets, "" for its default; of folder: the folder
  config.profile = "exponential"  # exponential | step (as LDAM) | natural (all) | list (of a file)
  config.imbalance = 100.0  # exponential, step: images of the largest class / of the smallest
  config.split_seed = 0  # which images the tail keeps; 0 is the field's standard
  config.list_path = ""  # list: indices (.npz, .npz:key) or an official list (path label per line)
  config.holdout = 0.0  # share of each class's training images kept for selection; 0: none
  config.image_size = 0  # side in pixels of large sets and folders; 0: as stored
  config.skip_unreadable = False  # folder: leave out images that cannot be read, and say so
  config.test_share = 0.0  # folder: share of each class split off as the test set; 0: it has one
  config.test_seed = 0  # folder: which images are split off
  return config


def embeddings() -> ConfigDict:
  """The data set of experiments on features that another model made."""
  config = ConfigDict()
  config.train_path = ""  # .npz, .npy, .parquet or a folder of the last: numbers and label per row
  config.train_labels_path = ""  # of .npy alone: the file of its labels
  config.test_path = ""  # as train_path; "": in the same .npz, or split off by test_share
  config.test_labels_path = ""  # of .npy alone
  config.test_share = 0.0  # share of each class split off as the test set; 0: one is given
  config.test_seed = 0  # which rows are split off
  config.arrays = ConfigDict()  # names in .npz files
  config.arrays.features = "features"  # [N, D] numbers
  config.arrays.labels = "labels"  # [N] whole numbers or texts
  config.arrays.class_names = "class_names"  # [C] texts, in order of the classes; need not be there
  config.arrays.test_features = "test_features"  # the test set in the file of train_path
  config.arrays.test_labels = "test_labels"
  config.columns = ConfigDict()  # names in Parquet files
  config.columns.features = "features"  # lists; or a column per number: dim_* for dim_0, dim_1, ...
  config.columns.label = "label"  # whole numbers or texts
  config.profile = "natural"  # natural (all) | exponential | step (as LDAM, of balanced files)
  config.imbalance = 100.0  # exponential, step: rows of the largest class / of the smallest
  config.split_seed = 0  # which rows the tail keeps; the others judge and are the oracle
  config.holdout = 0.0  # share of each class's training rows kept for selection; 0: none
  config.skip_non_finite = False  # leave out rows with a NaN or an infinity, and say so
  return config


def optimizer() -> ConfigDict:
  config = ConfigDict()
  config.name = "sgd"  # sgd | adamw
  config.learning_rate = 0.1  # peak, after warm-up
  config.schedule = "step"  # step | cosine (to 0) | constant
  config.milestones = (0.8, 0.9)  # step: shares of the steps at which the rate changes ...
  config.factors = (0.01, 0.0001)  # ... to the peak times these
  config.momentum = 0.9  # of sgd, b1 of adamw
  config.nesterov = False  # Nesterov's momentum
  config.weight_decay = 2e-4  # L2 in sgd, decoupled in adamw
  config.warmup = 0.025  # share of the steps with a rising rate
  config.clip_norm = 0.0  # cap of the gradient norm; 0: none
  config.accumulate = 1  # batches whose mean gradient makes one update
  return config


def cosine(learning_rate: float, weight_decay: float, warmup: float = 0.05) -> ConfigDict:
  """sgd with Nesterov's momentum and cosine decay."""
  config = optimizer()
  config.learning_rate, config.weight_decay, config.warmup = learning_rate, weight_decay, warmup
  config.schedule, config.milestones, config.factors = "cosine", (), ()
  config.nesterov = True
  return config


def encoder() -> ConfigDict:
  config = ConfigDict()
  config.backbone = ConfigDict()
  config.backbone.name = "resnet32"  # resnet8, 20, 32, 44, 56: small images; 10, 18, 50: 224 px
  config.backbone.head = "auto"  # auto (as the loss asks) | linear | cosine
  config.backbone.scale = 30.0  # of cosine logits
  config.backbone.taps = ()  # features from inner stages, "2:2": stage 2 averaged to a 2 x 2 grid
  config.backbone.dtype = "float32"  # of the computation: float32 | bfloat16; weights are float32
  config.input = ConfigDict()
  config.input.mean = ()  # of pixels in [0, 1], ordered as `channels`; (): of the training images
  config.input.std = ()
  config.input.channels = "rgb"  # rgb | bgr, the order the encoder expects
  config.init_from = ""  # weights to start from: a PyTorch state dict as .npz or .safetensors
  config.init_head = True  # whether its head is read too; False: drawn anew
  return config


def classifier() -> ConfigDict:
  config = ConfigDict()
  config.loss = "cross_entropy"  # a row of memdiff.classifier.losses.LOSSES: ldam_drw, csl, ...
  config.references = ()  # further losses, trained as rows of the table
  config.loss_parameters = ConfigDict()  # each is read by the losses whose formula has it
  config.loss_parameters.beta = 0.9999  # effective number: 0 weighs classes alike, 1 by 1 / count
  config.loss_parameters.power = 1.0  # cs_power: (n_min / n)^power
  config.loss_parameters.focusing = 1.0  # focal: (1 - p)^focusing
  config.loss_parameters.margin = 0.5  # ldam: of the smallest class, as a cosine
  config.loss_parameters.tau = 1.0  # logit_adjustment: times the log of the class prior
  config.loss_parameters.defer = 0.8  # *_drw, csl: share of the steps before weights set in
  config.loss_parameters.tail_share = 0.3  # csl_*, focal_tail: share of the classes called tail
  config.loss_parameters.contrastive_weight = 0.35  # bcl: of the contrastive part
  config.loss_parameters.embedding_dim = 128  # bcl: of the contrastive embeddings
  config.loss_parameters.temperature = 0.1  # bcl
  config.augment = ConfigDict()
  config.augment.padding = 4  # crop back at random after zero padding by so many pixels; 0: no
  config.augment.flip = True  # mirror half of the images
  config.augment.policy = "none"  # none | autoaugment | randaugment
  config.augment.num_layers = 2  # randaugment: operations per image
  config.augment.magnitude = 9.0  # randaugment: 0 to 30
  config.augment.cutout = 0  # side of the square set to the mean, pixels; 0: none
  config.augment.mixup = 0.0  # alpha of Beta(alpha, alpha); 0: none
  config.stream = ConfigDict()  # large sets, which are read while training
  config.stream.num_threads = 0  # that read and decode, in each process; 0: a core each, up to 16
  config.stream.num_workers = 0  # processes beside them; 0: threads of this one
  config.stream.prefetch = 2  # batches that each process reads ahead
  config.batch_size = 128  # images
  config.num_epochs = 200.0  # passes over the training images; 0: none, with init_from
  config.optimizer = optimizer()
  return config


def decoupled() -> ConfigDict:
  config = ConfigDict()
  config.methods = ()  # logit_adjustment, tau_norm, ncm, crt, lws: heads on the frozen encoder
  config.adjustment = 1.0  # logit_adjustment: times the log of the class prior
  config.tau = 1.0  # tau_norm, where nothing is held out to choose it
  config.num_epochs = 10.0  # crt and lws
  config.optimizer = cosine(0.1, 5e-4)
  return config


def memory_bank() -> ConfigDict:
  config = ConfigDict()
  config.num_slots = 32  # stored features per class
  config.horizon = 1000  # features until the mean becomes an exponential average
  return config


def objective() -> ConfigDict:
  """Of the denoiser: DDPM's mean squared error; what is 0 is left out."""
  config = ConfigDict()
  config.loss = "mse"  # mse | infonce
  config.min_snr = 0.0  # caps signal / noise by which squared errors of x0 weigh: 5.0; 0: off
  config.infonce = ConfigDict()  # matches each predicted noise to its own noise in the batch
  config.infonce.temperature = 0.1  # of cosines
  config.infonce.mse_weight = 1.0  # of mse beside it; without any, samples have no scale
  config.supcon = ConfigDict()  # CORAL: classes apart at the bottleneck
  config.supcon.weight = 0.0  # w of w exp((1 - t / T) / decay)
  config.supcon.decay = 0.3
  config.supcon.temperature = 0.1
  config.supcon.projection_dim = 128
  config.cbdm = ConfigDict()  # pulls the predictions for different classes together
  config.cbdm.weight = 0.0  # at t = T
  config.cbdm.commitment = 0.25  # share of the term that moves the other class's prediction
  config.cbdm.labels = "empirical"  # other classes by their counts: empirical | uniform
  return config


def diffusion() -> ConfigDict:
  config = ConfigDict()
  config.schedule = ConfigDict()
  config.schedule.name = "cosine"  # cosine | linear
  config.schedule.num_steps = 1000  # T
  config.denoiser = ConfigDict()
  config.denoiser.name = "mlp"  # mlp | transformer
  config.denoiser.width = 256  # hidden units
  config.denoiser.num_blocks = 3  # residual blocks
  config.denoiser.embedding_dim = 64  # of time; mlp: of class, conditioning; transformer: of a head
  config.denoiser.num_heads = 4  # of the attention over stored features
  config.class_exponent = 0.5  # classes drawn by count^this: 1 as they are, 0 balanced
  config.prediction = "v"  # v | eps | x0, what the denoiser predicts
  config.condition = "class_and_memory"  # what it is told: class_and_memory | memory | class
  config.label_dropout = 0.1  # share of samples trained without label and memory
  config.anonymous = 0.5  # share of the other rows treated as unseen classes: label hidden ...
  config.displacement = (
    1.0  # ... and moved by this x class differences (unused with condition class)
  )
  config.objective = objective()
  config.ema_decay = 0.999  # of the weights that sample
  config.batch_size = 128  # features
  config.num_steps = 2000
  config.optimizer = optimizer()
  config.optimizer.update(
    name="adamw", learning_rate=1e-3, schedule="cosine", milestones=(), factors=(),
    weight_decay=0.01, warmup=0.05, clip_norm=1.0,
  )  # fmt: skip
  return config


def hallucination() -> ConfigDict:
  config = ConfigDict()
  config.sampler = "ddim"  # ddpm | ddpm_beta | ddim | dpm++
  config.num_steps = 50  # denoiser calls per sample
  config.condition = "memory"  # memory | class_and_memory | class
  config.guidance = (1.0,)  # candidates; 1: none, above: towards the class
  config.start = (1.0,)  # candidates; below 1: from exemplars noised for this share of the steps
  config.x0_limit = 8.0  # clips predicted features, standard deviations; 0: none
  config.chunk_size = 1024  # samples at a time, bounds the memory; devices share them by 16
  return config


def generators() -> ConfigDict:
  config = ConfigDict()
  config.names = (  # what makes features; memdiff.generators.DESCRIPTIONS lists all
    "duplicate", "kernel_jitter", "feature_mixup", "gaussian_shared", "gaussian_shrunk",
    "class_only", "memdiff",
  )  # fmt: skip
  config.tail_below = 100  # classes with fewer training examples are filled ...
  config.fill_to = (100,)  # ... up to one of these numbers
  config.confidence = ConfigDict()
  config.confidence.name = "cosine"  # cosine | certainty | entropy_literal | probability | none
  config.confidence.power = 1.0  # above 1: trust only the best
  config.confidence.calibrate = False  # 1 where a feature is as typical as the real ones
  config.confidence.normalize = True  # to mean 1 within each class
  config.fasa = ConfigDict()
  config.fasa.num_epochs = 20  # over the training features
  config.fasa.batch_size = 128  # features
  config.fasa.optimizer = cosine(0.05, 5e-4)
  config.ldmlr_share = 1.0  # of the published number of training steps
  return config


def head() -> ConfigDict:
  config = ConfigDict()
  config.losses = (  # rows of every generator
    "cross_entropy", "logit_adjustment", "balanced_softmax", "csl"
  )  # fmt: skip
  config.exponents = (1.0,)  # candidates; classes are drawn by (real + synthetic)^exponent
  config.l2 = (5e-4, 5e-3, 5e-2)  # candidates; l2 / 2 times the squared length of the kernel
  config.taus = (1.0, 0.5, 1.5)  # candidates; logit_adjustment: times the log of the class prior
  config.training = ConfigDict()
  config.training.start = "encoder"  # encoder: go on from its head | zeros
  config.training.beta = 0.9999  # csl: effective number, as in the classifier
  config.training.gamma_counts = "effective"  # csl: real + trusted synthetic features | real
  config.training.defer = 0.0  # csl: share of the steps before the class weights set in
  config.training.batch_size = 256  # features, real and synthetic
  config.training.num_steps = 1000
  config.training.optimizer = cosine(0.05, 0.0)
  return config


def selection() -> ConfigDict:
  config = ConfigDict()
  config.folds = 5  # of cross-validation on training data; 0: none, the first candidates are used
  config.repeats = 1  # repetitions, each with new folds
  config.encoder = "frozen"  # frozen | retrained: one per fold, without its images
  config.criterion = "balanced_accuracy"  # balanced_accuracy | accuracy | macro_f1: what is best
  return config


def joint() -> ConfigDict:
  """Encoder and head on images and hallucinated features together, beside heads alone."""
  config = ConfigDict()
  config.generators = ()  # real (the control) and any of generators.names; (): none
  config.loss = "balanced_softmax"  # cross_entropy | balanced_softmax | csl, with head.training's
  config.counts = "real"  # real | effective, for prior and gamma; effective adds trusted synthetic
  config.num_rounds = 4  # of equal length; the first sees images only
  config.ramp = 0.5  # share of the other rounds over which synthetic features gain weight
  config.refresh_drift = 0.1  # shift of the class means, over their spread, that asks for new ones
  config.added_batch_size = 64  # synthetic features beside classifier.batch_size images
  return config


def loop() -> ConfigDict:
  config = ConfigDict()
  config.steps_per_dispatch = 50  # steps per call of the compiled program
  config.eval_every = 1000  # steps
  config.checkpoint_every = 1000  # steps; a killed run loses at most these
  config.keep_checkpoints = 2  # the newest ...
  config.keep_every = 0  # ... and one every so many steps for good; 0: none
  config.on_non_finite = "stop"  # stop, and keep the batch | skip the step
  config.max_skipped = 0  # skip: steps that may be skipped before the run stops
  return config


def execution() -> ConfigDict:
  """How a run is executed; may change when it is resumed."""
  config = ConfigDict()
  config.parameters = "replicated"  # replicated | fsdp, split with their optimiser over the devices
  config.show_folds = False  # whether TensorBoard shows the trainings of cross-validation
  config.profile_stage = ""  # name of the stage to profile, "classifier/csl"
  config.profile_steps = ()  # (first, last) of its steps; lands in the stage's folder
  return config


def classification(name: str) -> ConfigDict:
  """Image classifiers, one row of the field's tables or several."""
  config = ConfigDict()
  config.experiment = "classification"
  config.name = name
  config.seeds = (0, 1, 2)  # initialisation and training; all run at once
  config.dataset = dataset()
  config.encoder = encoder()
  config.classifier = classifier()
  config.memory_bank = memory_bank()  # of losses that read it: semantic_scale
  config.decoupled = decoupled()
  config.loop = loop()
  config.execution = execution()
  return config


def on_features(config: ConfigDict) -> None:
  """Adds what an experiment does with features, wherever they come from."""
  config.diffusion = diffusion()
  config.hallucination = hallucination()
  config.generators = generators()
  config.head = head()
  config.selection = selection()
  config.evaluation = ConfigDict()
  config.evaluation.map_per_class = 60  # points per class and kind in the t-SNE picture


def memdiff(name: str) -> ConfigDict:
  """The whole of memdiff: hallucinated features for the tail, and what they are worth."""
  config = classification(name)
  del config.decoupled
  config.experiment = "memdiff"
  config.classifier.loss = "csl"
  config.classifier.references = ("cross_entropy",)
  on_features(config)
  config.joint = joint()
  config.selection.encoder = "retrained"
  return config


def proco_recipe(config: ConfigDict) -> None:
  """The recipe of ProCo (Du et al. 2024): stronger augmentation, longer, larger batches."""
  config.classifier.augment.policy = "autoaugment"
  config.classifier.augment.cutout = 16
  config.classifier.batch_size = 256
  config.classifier.num_epochs = 400.0
  config.classifier.optimizer.learning_rate = 0.3
  config.classifier.optimizer.milestones = (0.9, 0.95)  # epochs 360 and 380 of 400
  config.classifier.optimizer.factors = (0.1, 0.01)


def imagenet_recipe(config: ConfigDict) -> None:
  """224 px with a ResNet-50: cosine decay over 90 epochs, as BCL and ProCo train ImageNet-LT."""
  config.seeds = (0,)
  config.dataset.image_size = 224
  config.encoder.backbone.name = "resnet50"
  config.encoder.backbone.dtype = "bfloat16"
  config.encoder.input.mean = (0.485, 0.456, 0.406)
  config.encoder.input.std = (0.229, 0.224, 0.225)
  config.classifier.augment.padding = 0  # random resized crops are cut while decoding
  config.classifier.batch_size = 256
  config.classifier.num_epochs = 90.0
  config.classifier.optimizer = cosine(0.1, 5e-4)
  config.classifier.optimizer.nesterov = False
  if "decoupled" in config:
    config.decoupled.optimizer.learning_rate = 0.2
  config.loop.steps_per_dispatch = 5
  config.loop.checkpoint_every = 500
  config.loop.eval_every = 500


def large_memdiff(config: ConfigDict) -> None:
  """memdiff on 2,048 features of a set of a thousand classes and more. Nothing here is tuned."""
  config.classifier.references = ()
  config.memory_bank.num_slots = 256
  config.diffusion.denoiser.update(
    name="transformer", width=1024, num_blocks=4, embedding_dim=128, num_heads=8
  )
  config.diffusion.batch_size = 256
  config.diffusion.num_steps = 50_000
  config.hallucination.chunk_size = 4096  # 256 groups of 16, one for each device of a large slice
  config.generators.names = ("duplicate", "kernel_jitter", "class_only", "memdiff")
  config.head.training.num_steps = 20_000
  config.selection.encoder = "frozen"  # images that are streamed allow nothing else
  config.selection.folds = 0  # every fold would hold the training features once more


def choose(variant: str, variants: dict) -> None:
  """Applies the function that `variant` names; "default" is none."""
  if variant == "default":
    return
  if variant not in variants:
    names = ", ".join(["default", *variants])
    raise ValueError(f"unknown variant {variant!r}; the variants are {names}.")
  variants[variant]()
