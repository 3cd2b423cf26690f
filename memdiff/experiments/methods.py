"""Methods, a generator with a loss each, as in `memdiff+csl`: their settings and their words.

`real` is no generator at all, `own_head` is the head that the encoder was trained with. Two
references use what no method may: `oracle` adds the real features that the long tail left out,
`unseen_exemplars` trains on left-out features in place of the training ones, as far as there are
any.
"""

import dataclasses
import itertools

from memdiff.classifier import heads, losses
from memdiff.evaluation.method import Method
from memdiff.experiments.base import Experiment
from memdiff.synthesis.generators import GENERATORS, SynthesisSettings

REAL, OWN = "real", "own_head"
REFERENCES = {
  "oracle": "real features that the long tail left out: the most that hallucination can reach",
  "unseen_exemplars": "left-out features in place of the training ones, as far as there are any",
}


@dataclasses.dataclass(frozen=True)
class Choice:
  """How a method is set: what cross-validation chooses."""

  strength: float = 0.0
  fill: int = 0
  exponent: float = 1.0
  l2: float = 0.0
  tau: float = 1.0


def synthesis_settings(experiment: Experiment) -> SynthesisSettings:
  config = experiment.config
  return SynthesisSettings(
    config.generators, config.diffusion, config.hallucination, experiment.dataset.num_classes
  )


def candidates(experiment: Experiment, name: str, loss: str) -> list[Choice]:
  """The settings of a method, the ones to take without cross-validation first.

  Those that differ in nothing but tau share their heads.
  """
  head = experiment.config.head
  taus = head.taus if loss == "logit_adjustment" else (1.0,)
  strengths, fills = (0.0,), (0,)
  if name != REAL:
    generator = synthesis_settings(experiment).generator(name)
    fixed = generator.numbers(experiment.dataset.train_counts) is not None
    strengths, fills = (
      generator.strengths,
      (heads.ALL,) if fixed else experiment.config.generators.fill_to,
    )
  every = itertools.product(taus, strengths, fills, head.exponents, head.l2)
  return [Choice(strength, fill, x, l2, tau) for tau, strength, fill, x, l2 in every]


def methods(experiment: Experiment) -> list[Method]:
  """All methods that may be recommended."""
  names = (REAL, *experiment.config.generators.names)
  return [Method.of(name, loss) for name in names for loss in experiment.config.head.losses]


def chosen_strengths(choices: dict[str, Choice], name: str) -> list[float]:
  """The strengths at which a generator is used, by any loss."""
  return sorted({c.strength for method, c in choices.items() if Method(method).generator == name})


def own_tau(experiment: Experiment, choices: dict[str, Choice]) -> float:
  """By how many times the log prior the logits of the encoder's own head are lowered."""
  choice = choices.get(Method.of(OWN, "logit_adjustment"))
  return experiment.config.head.taus[0] if choice is None else choice.tau


def describe(experiment: Experiment, method: Method, choices: dict[str, Choice]) -> str:
  """A method in words."""
  name, loss = method.generator, method.loss
  if name == REAL:
    source = "real features only"
  elif name in REFERENCES:
    source = REFERENCES[name]
  else:
    source = GENERATORS[name].description
  words = f"{source}; {heads.LOSSES[loss]}"
  choice = choices.get(method)
  if choice is None:
    return words
  details = [f"classes drawn by count^{choice.exponent:g}", f"L2 {choice.l2:g}"]
  if loss == "logit_adjustment":
    details.append(f"tau {choice.tau:g}")
  if name != REAL and choice.fill != heads.ALL:
    details.append(f"filled to {choice.fill}")
  if name != REAL and len(synthesis_settings(experiment).generator(name).strengths) > 1:
    details.append(f"strength {choice.strength:g}")
  return f"{words} ({', '.join(details)})"


def describe_joint(experiment: Experiment, name: str) -> str:
  """Joint training with a generator, in words."""
  config = experiment.config.joint
  parts = ["real images", *(["generated ones"] if config.images else [])]
  parts += [] if name == REAL else [GENERATORS[name].description]
  source = "real images only" if len(parts) == 1 else " and ".join(parts)
  return f"encoder and head trained together on {source}; {heads.LOSSES[config.loss]}"


def describe_own(experiment: Experiment, loss: str) -> str:
  if experiment.config.classifier.num_epochs == 0:
    return "encoder and head as they were read"
  return f"encoder and head trained with {losses.LOSSES[loss].description}"
