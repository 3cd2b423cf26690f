"""A denoiser that compiles fast, for tests of what is around LDMLR's U-Net."""

import flax.linen as nn


class TinyDenoiser(nn.Module):
  num_classes: int
  feature_dim: int

  def setup(self):
    self.embedding = nn.Embed(self.num_classes, self.feature_dim)
    self.layer = nn.Dense(self.feature_dim)

  def condition(self, label, memory):
    return self.embedding(label)

  def denoise(self, x_t, t, context):
    return self.layer(x_t + context) + t[:, None] / 1000, context

  def __call__(self, x_t, t, label, memory):
    return self.denoise(x_t, t, self.condition(label, memory))
