"""The name of a method."""


class Method(str):
  """`memdiff+csl`: what the head is trained on beside real features, and by which loss.

  A string, since methods are the keys of reports. The loss stands behind the last +; that of a
  name without one, such as `own_head`, is empty.
  """

  __slots__ = ()

  @classmethod
  def of(cls, generator: str, loss: str) -> "Method":
    return cls(f"{generator}+{loss}")

  @property
  def generator(self) -> str:
    return self.rpartition("+")[0] or str(self)

  @property
  def loss(self) -> str:
    return self.rpartition("+")[2] if "+" in self else ""
