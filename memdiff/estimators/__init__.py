"""Estimators in the manner of scikit-learn, for features in memory."""

from memdiff.estimators.classifier import LongTailClassifier
from memdiff.estimators.hallucinator import FeatureHallucinator

__all__ = ["FeatureHallucinator", "LongTailClassifier"]
