"""memdiff: long-tailed recognition with memory-conditioned diffusion."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FeatureHallucinator", "LongTailClassifier"]

if TYPE_CHECKING:
  from memdiff.estimators import FeatureHallucinator, LongTailClassifier


def __getattr__(name: str) -> Any:
  """Estimators are imported when they are asked for, since their libraries take seconds."""
  if name in __all__:
    from memdiff import estimators

    return getattr(estimators, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
