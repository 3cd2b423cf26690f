"""The compiled programs of a stage, shared by all stages that run the same functions.

A stage's functions are compiled once for each shape of their arguments. Stages that are built of
the very same function objects share them: heads of every generator, denoisers of seeds and folds.
"""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from memdiff.runtime import ahead, guard
from memdiff.runtime import checkpoint as checkpoint_lib
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.stage import Run, Stage

_KEPT = 16  # programs; each keeps what its functions refer to alive


def state_specs(stage: Stage, run: Run) -> Any:
  """Specs of one seed's state."""
  per_seed = jax.eval_shape(lambda per_seed: jax.tree.map(lambda x: x[0], per_seed), stage.per_seed)
  one_seed = jax.eval_shape(stage.init, jax.random.key(0), per_seed)
  return mesh_lib.state_specs(one_seed, run.mesh, run.execution.parameters)


def state_shardings(stage: Stage, run: Run) -> Any:
  """Shardings of the stage's state, seeds included."""
  return jax.tree.map(
    lambda spec: NamedSharding(run.mesh, mesh_lib.with_seed_axis(spec)), state_specs(stage, run)
  )


def abstract_state(stage: Stage, run: Run) -> Any:
  """Shapes, dtypes and shardings of the stage's state over all seeds."""
  keys = jax.eval_shape(lambda: run.keys(stage.streams or stage.name))
  shapes = jax.eval_shape(jax.vmap(stage.init), keys, stage.per_seed)
  return checkpoint_lib.abstract(shapes, state_shardings(stage, run))


@functools.lru_cache(maxsize=_KEPT)
def _jit_init(init: Callable, shardings: "_Shardings") -> Callable:
  # One after the other and hardly optimised: it runs once, and drawing compiles slowly in a batch.
  on_cpu = jax.default_backend() == "cpu"
  return jax.jit(
    lambda keys, per_seed: jax.lax.map(lambda of_seed: init(*of_seed), (keys, per_seed)),
    out_shardings=shardings.tree,
    compiler_options={"xla_backend_optimization_level": 0} if on_cpu else None,
  )


def make_init(stage: Stage, run: Run) -> Callable:
  """The jitted () -> state of all seeds, born where it belongs."""
  init = _jit_init(stage.init, _Shardings(state_shardings(stage, run)))
  return functools.partial(init, run.keys(stage.streams or stage.name), stage.per_seed)


def over_seeds(function: Callable, one_by_one: bool) -> Callable:
  """(per_seed, shared) -> `function` mapped over the seeds, which lead in `per_seed`."""

  def of_all(per_seed: Any, shared: Any) -> Any:
    if one_by_one:
      return jax.lax.map(lambda per_seed: function(per_seed, shared), per_seed)
    return jax.vmap(function, in_axes=(0, None))(per_seed, shared)

  return of_all


@functools.lru_cache(maxsize=_KEPT)
def _jit_evaluate(evaluate: Callable, one_by_one: bool, mesh: Mesh) -> Callable:
  of_all = over_seeds(
    lambda per_seed, shared: evaluate(per_seed[0], shared, per_seed[1]), one_by_one
  )
  return jax.jit(
    lambda state, shared, per_seed: of_all((state, per_seed), shared),
    out_shardings=mesh_lib.replicated(mesh),
  )


def make_evaluate(stage: Stage, run: Run) -> Callable:
  """The jitted (state, shared, per_seed) -> {name: [S]}."""
  return _jit_evaluate(stage.evaluate, stage.one_by_one, run.mesh)


class _Shardings:
  """A tree of shardings (or specs) that can be a key."""

  def __init__(self, tree: Any):
    self.tree = tree
    leaves, structure = jax.tree.flatten(tree)
    self._key = tuple(leaves), structure

  def __hash__(self) -> int:
    return hash(self._key)

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, _Shardings) and self._key == other._key


class Dispatch:
  """The program that trains several steps of every seed, with its executables.

  (state, alive [S], shared, per_seed, batches, count []; at_most) -> (state, alive, metrics
  [S, at_most]), of which the first `count` are filled. State and `alive` are donated; `batches` is
  None or has arrays that lead with [S, at_most].
  """

  def __init__(self, program: Callable):
    self._program = program
    self._executables = {}
    self._lock = threading.Lock()  # who comes second waits for the first to compile

  def lower(self, *arguments, at_most: int):
    return self._program.lower(*arguments, at_most=at_most)

  def compile(self, arguments: tuple, at_most: int, announced) -> Callable:
    """The executable for these arguments, new or not.

    Args:
      arguments: all of them.
      at_most: steps per dispatch.
      announced: context in which a new one is compiled.
    """
    leaves, structure = jax.tree.flatten(arguments)
    key = (
      at_most,
      structure,
      tuple((jax.typeof(x), getattr(x, "sharding", None)) for x in leaves),
    )
    with self._lock:
      if key not in self._executables:
        with announced:
          lowered = self.lower(*arguments, at_most=at_most)
          ahead.python_is_free()
          self._executables[key] = lowered.compile()
      return self._executables[key]


class SeedBySeed(Dispatch):
  """As `Dispatch`, of a program for one seed, which each seed runs in a thread of its own.

  XLA's CPU backend keeps one core busy with a small network, so that several seeds share the cores.
  """

  def __init__(self, program: Callable, mesh: Mesh):
    super().__init__(program)
    self._sharding = mesh_lib.replicated(mesh)
    self._of_seed = jax.jit(_of_seed, out_shardings=self._sharding)
    self._join = jax.jit(
      lambda *parts: jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts),
      out_shardings=self._sharding,
    )

  def lower(self, state, alive, shared, per_seed, batches, count, *, at_most: int):
    shapes = jax.eval_shape(_of_seed, (state, alive, per_seed, batches), 0)
    of_seed = checkpoint_lib.abstract(shapes, jax.tree.map(lambda _: self._sharding, shapes))
    return self._program.lower(*of_seed, shared, count, at_most=at_most)

  def compile(self, arguments: tuple, at_most: int, announced) -> Callable:
    executable = super().compile(arguments, at_most, announced)
    return _Threads(executable, self._of_seed, self._join)


def _of_seed(tree: Any, number: jax.Array) -> Any:
  """One seed's part of arrays that lead with seeds."""
  return jax.tree.map(lambda x: x[number], tree)


@dataclasses.dataclass(frozen=True)
class _Threads:
  """An executable for one seed, called as one for all."""

  executable: Callable
  of_seed: Callable
  join: Callable

  def __call__(self, state, alive, shared, per_seed, batches, count):
    def train(number):
      # A copy, which may be large, of what only this thread reads.
      own_part = self.of_seed((state, alive, per_seed, batches), np.int32(number))
      return jax.block_until_ready(self.executable(*own_part, shared, count))

    num_seeds = alive.shape[0]
    # More threads than cores: with two at a time, the third of three seeds would leave a core idle.
    with ThreadPoolExecutor(min(num_seeds, 2 * os.cpu_count())) as pool:
      return self.join(*pool.map(train, range(num_seeds)))

  def cost_analysis(self):
    return self.executable.cost_analysis()

  def memory_analysis(self):
    return self.executable.memory_analysis()


def compile_ahead(stage: Stage, run: Run) -> None:
  """Compiles what the first call of `loop.train` would, on data of the stage's shapes."""
  at_most = min(run.config.steps_per_dispatch, stage.num_steps)
  if stage.batches is not None or not at_most:
    return
  state = make_init(stage, run)()
  alive = mesh_lib.replicate(run.mesh, np.ones(len(run.seeds), bool))
  count = mesh_lib.replicate(run.mesh, np.int32(at_most))
  arguments = (state, alive, stage.shared, stage.per_seed, None, count)
  make_dispatch(stage, run).compile(arguments, at_most, contextlib.nullcontext())


def make_dispatch(stage: Stage, run: Run) -> Dispatch:
  """The program of a stage; the same one for every stage that runs the same step."""
  return _dispatch(
    stage.step,
    run.config.on_non_finite,
    run.execution.parameters,
    stage.one_by_one,
    _Shardings(state_specs(stage, run)),
    run.mesh,
  )


@functools.lru_cache(maxsize=_KEPT)
def _dispatch(
  step: Callable,
  on_non_finite: str,
  parameters: str,
  one_by_one: bool,
  specs: _Shardings,
  mesh: Mesh,
) -> Dispatch:
  step = guard.guarded(step, on_non_finite)
  if parameters == "fsdp":
    step = _with_split_parameters(step, specs.tree, mesh)
  step = jax.jit(step, inline=True)  # both uses below share one trace

  def train_one_seed(state, alive, per_seed, batches, shared, count, *, at_most):
    def take_step(number, state, alive):
      batch = jax.tree.map(lambda x: x[number], batches)
      return step(state, alive, shared, per_seed if batches is None else (per_seed, batch))

    # Room for the metrics of every step; a loop whose length is data serves the last steps as well.
    shapes = jax.eval_shape(take_step, 0, state, alive)[2]
    metrics = jax.tree.map(lambda x: jnp.zeros((at_most, *x.shape), x.dtype), shapes)

    def body(number, carry):
      *carry, metrics = carry
      *carry, found = take_step(number, *carry)
      metrics = jax.tree.map(lambda all_, x: all_.at[number].set(x), metrics, found)
      return *carry, metrics

    new, alive, metrics = jax.lax.fori_loop(0, count, body, (state, alive, metrics))
    if on_non_finite == "stop":
      new = guard.choose(alive, new, state)
    return new, alive, metrics

  if one_by_one:
    return SeedBySeed(jax.jit(train_one_seed, static_argnames="at_most", donate_argnums=0), mesh)

  def dispatch(state, alive, shared, per_seed, batches, count, *, at_most):
    train = functools.partial(train_one_seed, at_most=at_most)
    in_axes = (0, 0, 0, 0, None, None)
    return jax.vmap(train, in_axes)(state, alive, per_seed, batches, shared, count)

  everywhere = mesh_lib.replicated(mesh)
  shardings = jax.tree.map(
    lambda spec: NamedSharding(mesh, mesh_lib.with_seed_axis(spec)), specs.tree
  )
  return Dispatch(
    jax.jit(
      dispatch,
      static_argnames="at_most",
      donate_argnums=(0, 1),
      out_shardings=(shardings, everywhere, everywhere),
    )
  )


def _with_split_parameters(step: Callable, specs: Any, mesh: Mesh) -> Callable:
  """FSDP: parameters lie split, are gathered for the step, and are split again after it."""

  def fsdp_step(state, alive, *rest):
    whole = state.replace(
      params=mesh_lib.gather(state.params, mesh),
      model_state=mesh_lib.gather(state.model_state, mesh),
    )
    state, alive, metrics = step(whole, alive, *rest)
    state = state.replace(
      **{
        name: mesh_lib.constrain(getattr(state, name), getattr(specs, name), mesh)
        for name in ("params", "opt_state", "ema_params", "model_state")
      }
    )
    return state, alive, metrics

  return fsdp_step
