"""What becomes of XLA's errors, and of a coordinator that does not answer once."""

import jax
import pytest

from memdiff.errors import LostProcessError, OutOfMemoryError
from memdiff.runtime import distributed


def fail(words):
  with distributed.noticing():
    raise jax.errors.JaxRuntimeError(words)


def test_too_little_memory_is_a_sentence_of_its_own(monkeypatch):
  words = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore"
  for number in (1, 4):
    monkeypatch.setattr(jax, "process_count", lambda number=number: number)
    with pytest.raises(OutOfMemoryError, match=r"allocating 123 bytes\.\); lower the batch_size"):
      fail(words)


def test_other_failures_of_several_processes_mean_that_one_is_gone(monkeypatch):
  with pytest.raises(jax.errors.JaxRuntimeError):
    fail("INTERNAL: connection closed")
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(LostProcessError, match="lost touch with another one"):
    fail("INTERNAL: connection closed")


class Client:
  """A key-value store that does not answer the first times; then the other process goes silent."""

  def __init__(self, failures):
    self.calls, self._failures = 0, failures

  def key_value_set(self, *_):
    self.calls += 1
    if self.calls <= self._failures:
      raise RuntimeError("UNAVAILABLE")

  def key_value_dir_get(self, _):
    return [("memdiff/alive/1", "0")]


def watched(monkeypatch, client, timeout):
  """What the watch says until it ends."""
  said = []

  monkeypatch.setattr(distributed.global_state, "client", client)
  monkeypatch.setattr(distributed, "_BEAT", 0.02)
  watch = distributed._Watch(timeout)

  def abandon(error):
    said.append(str(error))
    watch._over.set()  # where the process ends

  monkeypatch.setattr(distributed, "abandon", abandon)
  watch.start()
  watch.join(30)
  assert not watch.is_alive()
  return said


def test_a_store_that_fails_once_does_not_end_the_signs_of_life(monkeypatch):
  client = Client(failures=3)
  (said,) = watched(monkeypatch, client, 0.3)
  assert "Process 1 of 1 has given no sign of life" in said and client.calls > 5


def test_a_coordinator_that_is_gone_ends_the_watch_in_silence(monkeypatch):
  client = Client(failures=10**6)
  assert watched(monkeypatch, client, 0.3) == [] and client.calls > 5
