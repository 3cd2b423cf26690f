"""Classifiers of features that are fitted in seconds: families of heads, and their blend."""
