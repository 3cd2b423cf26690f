"""Settings: every wrong value is one sentence that names field, value and what is allowed."""

import ast
import copy
import dataclasses
import pathlib
import typing
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import digits_lt, features
from configs.augmented import digits_lt as digits_augmented
from configs.images import digits_lt as digits_images
from memdiff import config as config_lib
from memdiff import describe, pipeline
from memdiff.config import above, at_least, between, build, each, one_of, setting, some_of
from memdiff.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
VALID = {  # of every kind of experiment
  "memdiff": digits_lt.get_config().to_dict(),
  "features": features.get_config().to_dict(),
  "classification": digits_lt.get_config("classification").to_dict(),
  "images": digits_images.get_config().to_dict(),
  "augmented": digits_augmented.get_config().to_dict(),
}


@dataclasses.dataclass(frozen=True)
class Inner:
  share: float = setting(0.5, "a share", between(0, 1))
  rate: float = setting(1.0, "per second", above(0))


@dataclasses.dataclass(frozen=True)
class Outer:
  count: int = setting(1, "how many", at_least(1))
  kind: str = setting("red", "its colour", one_of(("red", "green")))
  flag: bool = setting(False, "whether it flies")
  free: str = setting("", "any text")
  sizes: tuple[int, ...] = setting((1,), "in cm", each(lambda n: n >= 1, "whole numbers from 1"))
  names: tuple[str, ...] = setting((), "of some", some_of(("a", "b")))
  inner: Inner = setting(Inner(), "what it contains")

  def __post_init__(self):
    if self.count > 100 and self.flag:
      raise ValueError(f"count is {self.count}, but at most 100 with flag.")


GOOD = {
  "count": 3, "kind": "red", "flag": True, "free": "x", "sizes": (1, 2), "names": ("a",),
  "inner": {"share": 0.5, "rate": 2},
}  # fmt: skip


def replaced(values, path, value):
  """A deep copy of `values` with the field at the dotted `path` set to `value`."""
  values = copy.deepcopy(values)
  group = values
  *parents, name = path.split(".")
  for parent in parents:
    group = group[parent]
  group[name] = value
  return values


def refusal(cls, values) -> str:
  with pytest.raises(ConfigError) as caught:
    build(cls, values)
  assert caught.value.exit_code == 2
  message = str(caught.value)
  assert "\n" not in message and message.endswith(".")
  return message


# --- types and ranges ------------------------------------------------------------------------

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JUNK = st.sampled_from([None, "", "abc", [], {}, object(), b"1", 1j, (), "1"])
NOT_FINITE = st.sampled_from([float("nan"), float("inf"), -float("inf")])
WRONG = {
  "count": JUNK | NOT_FINITE | st.booleans() | st.floats(),
  "kind": st.sampled_from([None, 1, True, ("red",), 1.5]) | st.text(max_size=5),
  "flag": JUNK | NUMBERS | NOT_FINITE | st.sampled_from(["True", "false"]),
  "free": st.sampled_from([None, 1, True, (), 2.0, b"x"]),
  "sizes": st.sampled_from([None, 1, "12", (1.0,), (True,), ("1",), (1, None), {1}, (), (0,)]),
  "names": st.sampled_from([None, 1, "a", (1,), ("c",), ("a", "a"), {"a"}, (None,)]),
  "inner": JUNK.filter(lambda v: v != {}) | NUMBERS,
  "inner.share": JUNK | NOT_FINITE | st.booleans() | NUMBERS.filter(lambda v: not 0 <= v <= 1),
  "inner.rate": JUNK | NOT_FINITE | st.booleans() | st.floats(max_value=0),
}


@given(st.sampled_from(sorted(WRONG)).flatmap(lambda p: st.tuples(st.just(p), WRONG[p])))
def test_a_wrong_value_is_refused_with_field_and_value(case):
  path, value = case
  message = refusal(Outer, replaced(GOOD, path, value))
  assert message.startswith(f"config.{path} ") and repr(value) in message and "must be" in message


@pytest.mark.parametrize(
  ("path", "value", "words"),
  [
    ("count", 0, "at least 1"),
    ("count", True, "a whole number"),
    ("count", 2.0, "a whole number"),
    ("kind", "blue", "one of red, green"),
    ("flag", 1, "True or False"),
    ("free", 1, "a text"),
    ("sizes", (1, 0), "whole numbers from 1"),
    ("sizes", 3, "a tuple"),
    ("sizes", (1, 2.5), "a tuple in which each item is a whole number"),
    ("names", ("a", "c"), "distinct names out of a, b"),
    ("inner", 3, "a group of fields"),
    ("inner.share", 1.01, "between 0 and 1"),
    ("inner.share", float("nan"), "a number"),
    ("inner.rate", 0, "above 0"),
    ("inner.rate", True, "a number"),
  ],
)
def test_a_refusal_says_what_is_allowed(path, value, words):
  message = refusal(Outer, replaced(GOOD, path, value))
  assert message.startswith(f"config.{path} ") and words in message and repr(value) in message


def test_a_number_too_large_for_a_float_is_refused():
  message = refusal(Outer, replaced(GOOD, "inner.rate", 10**400))
  assert message.startswith("config.inner.rate ")


@given(
  st.integers(1, 99), st.sampled_from(["red", "green"]), st.booleans(),
  st.lists(st.integers(1, 9), min_size=1), st.permutations(["a", "b"]),
  st.floats(0, 1) | st.sampled_from([0, 1]),
)  # fmt: skip
def test_right_values_arrive_unchanged(count, kind, flag, sizes, names, share):
  inner = {"share": share, "rate": 1}
  settings = build(Outer, GOOD | {
    "count": count, "kind": kind, "flag": flag, "sizes": sizes, "names": names, "inner": inner,
  })  # fmt: skip
  assert (settings.count, settings.kind, settings.flag) == (count, kind, flag)
  assert settings.sizes == tuple(sizes) and settings.names == tuple(names)
  assert settings.inner == Inner(share, 1.0)
  assert type(settings.inner.share) is float and type(settings.inner.rate) is float


@pytest.mark.parametrize("path", ["cuont", "inner.shares"])
def test_an_unknown_field_is_refused_with_those_that_exist(path):
  message = refusal(Outer, replaced(GOOD, path, 1))
  fields = dataclasses.fields(Inner if "." in path else Outer)
  assert f"config.{path} does not exist" in message
  assert all(field.name in message for field in fields)


@pytest.mark.parametrize("path", ["count", "inner", "inner.rate"])
def test_a_missing_field_is_named(path):
  values = copy.deepcopy(GOOD)
  group = values
  *parents, name = path.split(".")
  for parent in parents:
    group = group[parent]
  del group[name]
  assert f"config.{path} is missing" in refusal(Outer, values)


def test_a_rule_between_fields_names_their_group():
  assert refusal(Outer, GOOD | {"count": 101}).startswith("config: count is 101")
  assert build(Outer, GOOD | {"count": 101, "flag": False}).count == 101


def test_settings_go_back_to_plain_values():
  plain = config_lib.as_dict(build(Outer, GOOD))
  assert plain == GOOD | {"sizes": [1, 2], "names": ["a"],
                          "inner": {"share": 0.5, "rate": 2.0}}  # fmt: skip
  assert config_lib.flatten(plain)["inner.rate"] == 2.0
  assert config_lib.flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


# --- in words --------------------------------------------------------------------------------


def test_a_description_tells_values_meanings_ranges_and_what_is_changed():
  page = describe.describe(Outer(count=3, inner=Inner(share=0.25)))
  assert (
    page.split("\n\n", 1)[1]
    == """\
* count = 3  (default 1)
      how many; at least 1
  kind = 'red'
      its colour; one of red, green
  flag = False
      whether it flies; True or False
  free = ''
      any text
  sizes = (1,)
      in cm; whole numbers from 1
  names = ()
      of some; distinct names out of a, b

inner: what it contains
* inner.share = 0.25  (default 0.5)
      a share; between 0 and 1
  inner.rate = 1.0
      per second; above 0"""
  )


@pytest.mark.parametrize("kind", sorted(VALID))
def test_every_field_of_an_experiment_is_described(kind):
  page = describe.describe(build(settings_of(kind), VALID[kind]))
  for path, value in config_lib.flatten(VALID[kind]).items():
    assert f" {path} = {value!r}" in page
  for line in page.splitlines():
    assert len(line) <= 100 or " = " in line


@pytest.mark.parametrize("kind", sorted(VALID))
def test_defaults_are_allowed_values(kind):
  settings = settings_of(kind)()
  assert build(settings_of(kind), config_lib.as_dict(settings)) == settings


# --- the experiments' own settings -----------------------------------------------------------


def settings_of(kind):
  """The settings dataclass of a kind of experiment."""
  return pipeline.KINDS[kind].settings


def settings_fields(cls, prefix=""):
  """(path, class, field) of every leaf reachable from `cls`."""
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.type):
      yield from settings_fields(field.type, f"{prefix}{field.name}.")
    else:
      yield f"{prefix}{field.name}", cls, field


LEAVES = {
  (kind, path): (cls, field) for kind in VALID for path, cls, field in settings_fields(
    settings_of(kind)
  )
}  # fmt: skip
# Kinds share most settings; each is tried once.
DISTINCT = {leaf: place for place, leaf in reversed(LEAVES.items())}


def test_there_is_a_valid_config_of_every_kind():
  assert set(VALID) == set(pipeline.KINDS)


@pytest.mark.parametrize(
  ("kind", "values"), [*VALID.items(), ("memdiff", digits_lt.get_config("smoke").to_dict())]
)
def test_the_shipped_config_is_complete_and_valid(kind, values):
  assert set(config_lib.flatten(values)) == {path for own, path in LEAVES if own == kind}
  settings = build(settings_of(kind), values)
  again = build(settings_of(kind), config_lib.as_dict(settings))
  assert settings == again


def wrong_for(kind):
  """A value of the wrong type for a field of this type."""
  if typing.get_origin(kind) is tuple:
    return st.sampled_from([None, 1, "ab", (None,), 2.5, ((1,),)])
  return {
    int: st.sampled_from([None, "1", True, 1.0, 2.5, float("nan"), (1,)]),
    float: st.sampled_from([None, "1", False, float("nan"), float("inf"), (0.5,)]),
    bool: st.sampled_from([None, 0, 1, "True"]),
    str: st.sampled_from([None, 1, True, ("x",)]),
  }[kind]


@pytest.mark.parametrize(("kind", "path"), sorted(DISTINCT.values()))
@given(data=st.data())
def test_every_setting_refuses_values_of_other_types(kind, path, data):
  value = data.draw(wrong_for(LEAVES[kind, path][1].type))
  message = refusal(settings_of(kind), replaced(VALID[kind], path, value))
  assert message.startswith(f"config.{path} is {value!r}, but must be ")


OUT_OF_RANGE = {
  "memdiff": {
    "experiment": ["features"],
    "seeds": [(), (-1,)], "dataset.name": ["mnist"], "dataset.profile": ["flat"],
    "dataset.imbalance": [0.5], "dataset.split_seed": [-1],
    "dataset.holdout": [-0.1, 0.6], "dataset.image_size": [-1],
    "dataset.test_share": [-0.1, 0.6], "dataset.test_seed": [-1],
    "encoder.backbone.name": ["resnet31"], "encoder.backbone.head": ["arc"],
    "encoder.backbone.scale": [0.0], "encoder.backbone.dtype": ["float16"],
    "encoder.backbone.taps": [("2",), ("0:1",), ("2:0",), ("2:2", "2-2"), ("2:100",), ("10:1",)],
    "encoder.input.mean": [(1.5,)], "encoder.input.std": [(0.0,)],
    "encoder.input.channels": ["rbg"],
    "classifier.loss": ["mse"], "classifier.references": [("mse",), ("csl", "csl")],
    "classifier.loss_parameters.beta": [-0.1, 1], "classifier.loss_parameters.power": [-0.5, 2.5],
    "classifier.loss_parameters.focusing": [-1.0], "classifier.loss_parameters.margin": [-0.1],
    "classifier.loss_parameters.tau": [-1.0], "classifier.loss_parameters.defer": [1.1],
    "classifier.loss_parameters.tail_share": [2.0],
    "classifier.loss_parameters.contrastive_weight": [-0.1],
    "classifier.loss_parameters.embedding_dim": [0],
    "classifier.loss_parameters.temperature": [0.0],
    "classifier.augment.padding": [-1], "classifier.augment.policy": ["trivial"],
    "classifier.augment.magnitude": [31.0], "classifier.augment.num_layers": [0],
    "classifier.augment.cutout": [-1], "classifier.augment.mixup": [-0.5],
    "classifier.stream.num_threads": [-1], "classifier.stream.num_workers": [-1],
    "classifier.stream.prefetch": [0], "classifier.batch_size": [0],
    "classifier.num_epochs": [-1.0], "classifier.optimizer.name": ["lion"],
    "classifier.optimizer.learning_rate": [0, -1.0], "classifier.optimizer.momentum": [1.0],
    "classifier.optimizer.schedule": ["linear"], "classifier.optimizer.weight_decay": [-1e-9],
    "classifier.optimizer.milestones": [(0.5, 1.5)], "classifier.optimizer.factors": [(0.0,)],
    "classifier.optimizer.warmup": [-0.1], "classifier.optimizer.clip_norm": [-1.0],
    "classifier.optimizer.accumulate": [0],
    "memory_bank.num_slots": [0], "memory_bank.horizon": [0],
    "diffusion.schedule.name": ["sigmoid"], "diffusion.schedule.num_steps": [1],
    "diffusion.denoiser.name": ["unet"], "diffusion.denoiser.width": [0],
    "diffusion.denoiser.num_blocks": [0], "diffusion.denoiser.embedding_dim": [3],
    "diffusion.denoiser.num_heads": [0],
    "diffusion.class_exponent": [1.5], "diffusion.prediction": ["noise"],
    "diffusion.condition": ["nothing"], "diffusion.label_dropout": [-0.5],
    "diffusion.anonymous": [-0.1, 1.5], "diffusion.displacement": [-1.0],
    "diffusion.objective.loss": ["l1"], "diffusion.objective.min_snr": [-1.0],
    "diffusion.objective.infonce.temperature": [0.0],
    "diffusion.objective.infonce.mse_weight": [-0.1],
    "diffusion.objective.supcon.weight": [-1.0], "diffusion.objective.supcon.decay": [0.0],
    "diffusion.objective.supcon.temperature": [0.0],
    "diffusion.objective.supcon.projection_dim": [0],
    "diffusion.objective.cbdm.weight": [-1.0], "diffusion.objective.cbdm.commitment": [-0.25],
    "diffusion.objective.supcon.place": ["output"], "diffusion.objective.supcon.reading": ["ours"],
    "diffusion.objective.separation.weight": [-1.0],
    "diffusion.objective.separation.margin": [0.0],
    "diffusion.objective.other_labels": ["real"],
    "diffusion.objective.transfer.rule": ["tail"],
    "diffusion.objective.transfer.before": [-0.1, 1.5],
    "diffusion.ema_decay": [1.0], "diffusion.batch_size": [0], "diffusion.num_steps": [0],
    "hallucination.sampler": ["euler"], "hallucination.num_steps": [1],
    "hallucination.condition": ["nothing"], "hallucination.guidance": [(), (-0.5,), (1.0, -1.0)],
    "hallucination.start": [(0.0,), (1.5,), ()],
    "hallucination.x0_limit": [-1.0], "hallucination.chunk_size": [0],
    "generators.names": [("memdiff", "gan"), ("memdiff", "memdiff")],
    "generators.tail_below": [0], "generators.fill_to": [(), (0,), (50, -1)],
    "generators.confidence.name": ["entropy"], "generators.confidence.power": [0.0],
    "generators.fasa.num_epochs": [0], "generators.fasa.batch_size": [0],
    "generators.ldmlr_share": [0.0],
    "head.losses": [("csl", "ldam"), ("csl", "csl")],
    "head.fitted": [("forest",), ("lda", "lda")],
    "head.exponents": [(), (0.5, 1.5), (-0.1,)], "head.l2": [(), (-1e-4,)],
    "head.taus": [(), (1.0, -0.5)],
    "head.training.start": ["random"], "head.training.beta": [-0.1, 1.0],
    "head.training.gamma_counts": ["fake"], "head.training.defer": [-0.5, 1.5],
    "head.training.batch_size": [0], "head.training.num_steps": [0],
    "selection.folds": [-1], "selection.repeats": [0], "selection.encoder": ["thawed"],
    "selection.criterion": ["top5"],
    "joint.generators": [("real", "gan"), ("real", "real")], "joint.loss": ["logit_adjustment"],
    "joint.counts": ["all"],
    "joint.num_rounds": [1], "joint.ramp": [-0.1, 1.5], "joint.refresh_drift": [-0.1],
    "joint.added_batch_size": [0], "joint.images_share": [0.0],
    "evaluation.map_per_class": [1],
    "loop.steps_per_dispatch": [0], "loop.eval_every": [0], "loop.checkpoint_every": [0],
    "loop.keep_checkpoints": [0], "loop.keep_every": [-50], "loop.on_non_finite": ["ignore"],
    "loop.max_skipped": [-1], "execution.parameters": ["split"],
  },
  "features": {
    "experiment": ["memdiff"], "seeds": [(2**32,)],
    "dataset.test_share": [-0.1, 0.6], "dataset.test_seed": [-1], "dataset.profile": ["list"],
    "dataset.imbalance": [0.9], "dataset.split_seed": [2**32],
  },
  "classification": {
    "experiment": ["features"], "seeds": [(-1,)],
    "decoupled.methods": [("ncm", "knn"), ("crt", "crt")], "decoupled.adjustment": [-1.0],
    "decoupled.tau": [-0.5, 2.5], "decoupled.num_epochs": [0.0],
  },
  "images": {
    "experiment": ["memdiff"], "seeds": [(-1,)],
    "methods": [(), ("gan",), ("ddpm", "ddpm"), ("cbdm+gan",), ("t2h+t2h",)],
    "diffusion.prediction": ["noise"], "diffusion.ema_decay": [1.0], "diffusion.num_steps": [0],
    "diffusion.class_exponent": [1.5], "diffusion.label_dropout": [-0.5],
    "diffusion.text.encoder": ["clip"], "diffusion.text.hidden": [-0.1, 1.5],
    "diffusion.text.alone": [1.5], "sampling.prompts.source": ["dreams"],
    "sampling.prompts.templates": [(), ("a photo",)], "sampling.prompts.contexts": [()],
    "sampling.prompts.per_class": [0], "diffusion.tuning.num_steps": [0],
    "diffusion.tuning.rank": [0], "diffusion.tuning.learning_rate": [0.0],
    "sampling.seeds.iterations": [-1], "sampling.seeds.learning_rate": [0.0],
    "sampling.seeds.semantic": [-1.0], "sampling.seeds.appearance": [-1.0],
    "sampling.seeds.tolerance": [1.0],
    "sampling.guide.kind": ["away"], "sampling.guide.temperature": [0.0],
    "sampling.guide.annealing.noise": [-1.0], "sampling.guide.annealing.begin": [1.5],
    "sampling.guide.annealing.end": [-0.1], "sampling.guide.annealing.mix": [2.0],
    "diffusion.memory.num_exemplars": [0], "diffusion.memory.hidden": [1.5],
    "diffusion.memory.invented": [-0.5], "diffusion.dropped_by": ["row"],
    "diffusion.batch_size": [0], "diffusion.unet.channels": [3],
    "diffusion.unet.multipliers": [(), (0,)], "diffusion.unet.num_blocks": [0],
    "diffusion.unet.attention": [(0,)], "diffusion.unet.dropout": [0.95],
    "diffusion.unet.dtype": ["float16"], "diffusion.unet.reserve.rank_ratio": [-0.1, 1.5],
    "diffusion.unet.reserve.scale": [0.0], "diffusion.balanced_last": [-0.1, 1.5],
    "diffusion.augmentation.probability": [-0.1, 1.5],
    "diffusion.objective.capacity.consistency": [-1.0],
    "diffusion.objective.capacity.diversity": [-0.2],
    "sampling.sampler": ["euler"], "sampling.num_steps": [1], "sampling.start": [0.0, 1.5],
    "sampling.guidance": [(), (-1.0,)], "sampling.per_class": [0], "sampling.chunk_size": [0],
    "evaluation.network": ["vgg"], "evaluation.side": [31], "evaluation.reference": ["all"],
    "evaluation.kid_size": [1], "evaluation.neighbours": [0],
  },
  "augmented": {
    "experiment": ["images"], "seeds": [(-1,)], "methods": [("gan",)],
    "pool.fill_to": [-1], "pool.surplus": [0.5], "pool.guidance": [-1.0],
    "pool.filters": [(), ("sure",), ("none", "none"), ("new&new",), ("new@0",), ("new@much",)],
    "text_to_image.side": [-8, 12],
    "text_to_image.dtype": ["float16"], "text_to_image.num_steps": [0],
    "text_to_image.tuning.rank": [0], "text_to_image.tuning.method": ["magic"],
    "text_to_image.tuning.num_steps": [0],
    "text_to_image.tuning.batch_size": [0], "text_to_image.tuning.prior_weight": [-1.0],
    "text_to_image.tuning.prior_images": [0],
    "text_to_image.guidance": [0.5], "text_to_image.batch_size": [0], "text_to_image.seed": [-1],
    "pool.rejected": [0.0, 0.5], "controls": [("real", "gan"), ("real", "real")],
    "added.way": ["late"], "added.share": [0.0], "added.warm_up": [-0.1, 1.1],
    "added.ramp": [-0.1, 1.1], "added.weight": [0.0], "added.counts": [("none",)],
    "losses": [("mse",)], "taus": [(-1.0,)],
    "sampling.sampler": ["euler"], "sampling.num_steps": [1], "sampling.chunk_size": [0],
    "sampling.start": [0.0, 1.5],
  },
}  # fmt: skip


def test_every_range_is_tried():
  limited = {
    (cls, field.name) for cls, field in DISTINCT if field.metadata.get("allowed") is not None
  }
  tried = [LEAVES[kind, path] for kind, paths in OUT_OF_RANGE.items() for path in paths]
  assert {(cls, field.name) for cls, field in tried} >= limited


@pytest.mark.parametrize(
  ("kind", "path", "value"),
  [
    (kind, path, value)
    for kind, paths in OUT_OF_RANGE.items()
    for path, values in paths.items()
    for value in values
  ],
)
def test_values_out_of_range_are_refused_with_the_range(kind, path, value):
  message = refusal(settings_of(kind), replaced(VALID[kind], path, value))
  field = LEAVES[kind, path][1]
  shown = repr(float(value)) if field.type is float else repr(value)
  assert message == f"config.{path} is {shown}, but must be {field.metadata['allowed'].words()}."


@pytest.mark.parametrize(
  ("path", "value", "words"),
  [
    ("seeds", (1, 2, 1), "each may stand only once"),
    ("hallucination.num_steps", 1001, "the diffusion has only 1000 steps"),
    ("hallucination.condition", "class", "the denoiser learns"),
    ("diffusion.anonymous", 0.0, "the denoiser learns class_and_memory;"),
    ("encoder.backbone.taps", ("3:1", "4:1"), "taps names stage 4, but resnet8 has 3"),
    ("encoder.input.mean", (0.5,), "mean has 1 channels and std 0"),
    ("classifier.optimizer.milestones", (0.5,), "1 milestones and 0 factors"),
    ("diffusion.denoiser.embedding_dim", 13, "must be even"),
    ("generators.names", (), "names is empty"),
    ("head.losses", (), "losses is empty"),
    ("head.training.optimizer.weight_decay", 5e-4, "regularised by l2"),
    ("selection.folds", 1, "cross-validation needs two or more, or 0 for none"),
    ("loop.eval_every", 75, "a multiple of steps_per_dispatch, 50"),
    ("loop.checkpoint_every", 20, "a multiple of steps_per_dispatch, 50"),
    ("loop.keep_every", 50, "a multiple of checkpoint_every"),
    ("diffusion.objective.capacity.diversity", 0.2, "denoisers of features have no reserve"),
    ("execution.profile_steps", (3,), "(first, last)"),
    ("execution.profile_steps", (3, 3), "first below last"),
    ("execution.profile_steps", (3, 5), "profile_stage and profile_steps go together"),
  ],
)
def test_settings_that_contradict_each_other_are_refused(path, value, words):
  message = refusal(settings_of("memdiff"), replaced(VALID["memdiff"], path, value))
  assert message.startswith("config") and words in message


def test_guidance_needs_a_denoiser_that_learns_without_labels():
  valid = replaced(VALID["memdiff"], "hallucination.start", (1.0,))
  blind = replaced(valid, "diffusion.label_dropout", 0.0)
  guided = replaced(blind, "hallucination.guidance", (1.0, 2.0))
  assert "without diffusion.label_dropout" in refusal(settings_of("memdiff"), guided)
  for values in (blind, replaced(valid, "hallucination.guidance", (1.0, 2.0))):
    assert build(settings_of("memdiff"), values).hallucination.guidance[0] == 1.0


def test_a_test_set_is_given_or_split_off_but_not_both():
  given_test = replaced(VALID["features"], "dataset.test_path", "test.npz")
  message = refusal(settings_of("features"), replaced(given_test, "dataset.test_share", 0.2))
  assert message.startswith("config.dataset: test_path is test.npz and test_share is 0.2")
  assert build(settings_of("features"), given_test).dataset.test_path == "test.npz"


@pytest.mark.parametrize(
  ("path", "value"),
  [
    ("seeds", (2**63,)),  # more than a JAX key takes
    ("seeds", (2**32,)),  # the key of seed 0 once more
    ("dataset.split_seed", 2**32),  # more than a RandomState takes
    ("classifier.optimizer.warmup", 1.0),  # leaves no step for the decay
    ("diffusion.optimizer.warmup", 1.0),
    ("head.training.optimizer.warmup", 1.0),
  ],
)
def test_values_that_would_break_a_phase_are_refused_before_any_work(path, value):
  message = refusal(settings_of("memdiff"), replaced(VALID["memdiff"], path, value))
  assert path.rsplit(".", 1)[-1] in message


def paths_of(kind):
  """The settings that are paths, by the names that paths have here."""
  ends = ("_path", "_dir", "init_from", "_file", "_folder")
  return [(kind, path) for own, path in LEAVES if own == kind and path.endswith(ends)]


PATHS = [pair for kind in VALID for pair in paths_of(kind)]


def test_paths_are_found_by_their_names():
  assert {path for _, path in PATHS} == {
    "dataset.data_dir", "dataset.list_path", "dataset.train_path", "dataset.train_labels_path",
    "dataset.test_path", "dataset.test_labels_path", "encoder.init_from",
  }  # fmt: skip


@pytest.mark.parametrize(("kind", "path"), PATHS)
def test_home_is_written_out_in_every_path(kind, path, monkeypatch):
  monkeypatch.setenv("HOME", "/home/somebody")

  def value_of(text):
    values = replaced(VALID[kind], "dataset.test_share", 0.0) if kind == "features" else VALID[kind]
    settings = build(settings_of(kind), replaced(values, path, text))
    return config_lib.flatten(config_lib.as_dict(settings))[path]

  assert value_of("~/data/[x].npz:key") == "/home/somebody/data/[x].npz:key"
  for text in ("", "./~", "a~b", "gs://bucket/~"):
    assert value_of(text) == text
  message = refusal(settings_of(kind), replaced(VALID[kind], path, "~nobody-has-this-name/x"))
  assert message.startswith(f"config.{path} is '~nobody-has-this-name/x'")


# --- no setting without an effect ------------------------------------------------------------

# Functions that look at settings without using them.
CHECKS = {"__post_init__", "check", "check_memdiff", "check_features", "check_conditions"}


def attributes_read(folder: pathlib.Path) -> set[str]:
  """Names of all attributes that the modules in `folder` read, outside functions that check."""
  names = set()

  def visit(node):
    if isinstance(node, ast.FunctionDef) and node.name in CHECKS:
      return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
      names.add(node.attr)
    for child in ast.iter_child_nodes(node):
      visit(child)

  for path in folder.rglob("*.py"):
    visit(ast.parse(path.read_text()))
  return names


@pytest.fixture(scope="module")
def read_names():
  return attributes_read(ROOT / "memdiff") | attributes_read(ROOT / "input_pipeline")


@pytest.mark.parametrize("path", sorted({path for _, path in LEAVES}))
def test_every_setting_is_read_by_some_code(path, read_names):
  for name in path.split("."):
    assert name in read_names, f"config.{path}: nothing reads .{name}"


def test_the_search_for_reads_sees_neither_checks_nor_assignments(tmp_path):
  (tmp_path / "m.py").write_text(
    "def check(c):\n  return c.checked\ndef f(c):\n  c.written = 1\n  return c.used\n"
  )
  assert attributes_read(tmp_path) == {"used"}


def test_every_group_of_settings_decides_some_phase():
  needs_bank = SimpleNamespace(classifier=SimpleNamespace(loss="semantic_scale", references=()))
  for kind in pipeline.KINDS.values():
    groups = {field.name for field in dataclasses.fields(kind.settings)}
    groups -= {"experiment", "execution"}  # how a run is executed may change when it goes on
    read = {name for phase in kind.phases for name in phase.fields_read(needs_bank)}
    assert {name for name in read if "." not in name} == groups


def read_by(phase, **changes):
  """The fields that a phase's manifest holds, of the smoke run with changes."""
  config = digits_lt.get_config("smoke")
  config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
  kind = pipeline.KINDS["memdiff"]
  e = SimpleNamespace(config=build(kind.settings, config.to_dict()), data_digests={})
  phase = next(p for p in kind.phases if p.name == phase)
  return pipeline.phase_config(e, kind.phases, phase)


def test_a_field_that_a_phase_does_not_read_does_not_undo_it():
  assert not any(name.startswith("memory_bank") for name in read_by("classifier"))
  assert "memory_bank.num_slots" in read_by("classifier", classifier__loss="semantic_scale")
  assert "memory_bank.num_slots" in read_by("memory_bank")
  diffusion, selection = read_by("diffusion"), read_by("selection")
  assert "generators.names" in diffusion and "generators.confidence.name" not in diffusion
  assert "generators.confidence.name" in selection and diffusion.items() <= selection.items()
