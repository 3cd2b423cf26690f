"""Backbones, losses, and the two training stages of the classifier: encoder and head."""
