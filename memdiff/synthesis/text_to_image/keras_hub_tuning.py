"""Tuning of Stable Diffusion 3 in KerasHub, by the one training loop.

The objective is that of the model: rectified flow with logit-normal times (Esser et al. 2024,
equations 13 and 19). What is trained are variables of Keras or parts of them. All of them are
replaced by function arguments, so that the step is pure.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from input_pipeline.batches import ByClass, draw_members, group_by_class
from input_pipeline.lazy_images import resize_and_crop
from memdiff.errors import ConfigError
from memdiff.runtime import distributed, loop, results, train_state
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import stream
from memdiff.synthesis.text_to_image.tuning import Examples, TuningConfig

LAYERS = ("attention_qkv", "attention_qkv2", "attention_proj", "attention_proj2")
_LORA_FILE, _MODEL, _RESULT = "diffuser.lora.h5", "model", "result.npz"
_BATCH = 8  # images that are encoded at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
  """A variable of Keras that is trained, or a part of it.

  Attributes:
    variable: the variable.
    index: of the part; ...: all of it.
  """

  variable: Any
  index: Any = ...

  @property
  def is_whole(self) -> bool:
    return self.index is ...

  def begin(self) -> jax.Array:
    return jnp.array(self.variable.value, jnp.float32)[self.index]

  def put(self, whole: jax.Array, part: jax.Array) -> jax.Array:
    """The variable's value `whole` with another part, of the same type."""
    return whole.at[self.index].set(part.astype(whole.dtype))


@flax.struct.dataclass
class _Told:
  """Images as the diffuser sees them, and the tokens of their prompts."""

  latents: Any  # [N, h, w, ch]
  tokens: Any  # {name: [P, L]} of distinct prompts
  prompt: Any  # [N] which of them
  by_class: ByClass


def tune(
  task: Any,
  config: TuningConfig,
  examples: Examples,
  prior: Examples | None,
  run: loop.Run,
  folder: pathlib.Path,
) -> None:
  """Tunes a `keras_hub.models.TextToImage`, or reads what was trained in `folder`.

  Args:
    task: the model, which is changed.
    config: what is trained, steps, optimiser, weight of the prior.
    examples: real images.
    prior: images of the same classes that the model drew before; None: none.
    run: of the loop; its first seed is trained.
    folder: of checkpoints and of the result; LoRA and a whole diffuser are also written as KerasHub
      reads them.
  """
  trained = select(task, config, examples.words)
  finished = (folder / _RESULT).exists()
  if not finished:
    loop.train(make_stage(task, config, trained, examples, prior, run.mesh), run, folder)
  for name, values in results.load(folder, run.mesh).params.items():
    part = trained[name]
    part.variable.assign(part.put(jnp.asarray(part.variable.value), values[0]))
  if not finished and distributed.is_main():
    if config.method == "lora":
      task.backbone.save_lora_weights(str(folder / _LORA_FILE))
    elif config.method == "dreambooth":
      task.save_to_preset(str(folder / _MODEL))
  distributed.barrier(str(folder))


def select(task: Any, config: TuningConfig, words: Mapping[str, str]) -> dict[str, Trained]:
  """What a method trains, by name; matrices of LoRA are added to the model.

  Args:
    task: the model.
    config: the method.
    words: {word: name of its class}.

  Raises:
    ConfigError: if the diffuser has nothing of the kind.
  """
  found = _SELECT[config.method](task, config, words)
  return {part.variable.path.replace("/", "."): part for part in found}


def _lora(task: Any, config: TuningConfig, _: Mapping[str, str]) -> list[Trained]:
  task.backbone.enable_lora(config.rank, target_layer_names=list(LAYERS))
  found = [Trained(v) for v in task.backbone.diffuser.variables if "lora" in v.path]
  return _if_any(found, "LoRA finds no attention")


def _dreambooth(task: Any, _: TuningConfig, __: Mapping[str, str]) -> list[Trained]:
  return [Trained(v) for v in task.backbone.diffuser.trainable_variables]


def _custom_diffusion(task: Any, _: TuningConfig, words: Mapping[str, str]) -> list[Trained]:
  """The attention of an MMDiT is one of image and text; queries, keys and values are one matrix."""
  found = []
  for variable in task.backbone.diffuser.trainable_variables:
    if "context_block/attention_qkv/" in variable.path:
      found.append(Trained(variable, np.s_[..., variable.shape[-1] // 3 :]))
  return [*_if_any(found, "there are no keys and values of a text"), *_rows(task, words)]


def _textual_inversion(task: Any, _: TuningConfig, words: Mapping[str, str]) -> list[Trained]:
  found = _rows(task, words)
  for part, tokenizer in zip(found, _tokenizers(task), strict=True):
    table = jnp.asarray(part.variable.value)
    names = [np.asarray(tokenizer(name)) for name in words.values()]
    part.variable.assign(part.put(table, jnp.stack([table[ids].mean(axis=0) for ids in names])))
  return found


_SELECT = {
  "lora": _lora,
  "dreambooth": _dreambooth,
  "custom_diffusion": _custom_diffusion,
  "textual_inversion": _textual_inversion,
}


def _if_any(found: list[Trained], lack: str) -> list[Trained]:
  if not found:
    raise ConfigError(
      f"config.text_to_image.tuning.method cannot be used, since {lack} in the diffuser of this"
      " model; take another method or none."
    )
  return found


def _tokenizers(task: Any) -> list[Any]:
  preprocessor = task.preprocessor
  return [p.tokenizer for p in (preprocessor.clip_l_preprocessor, preprocessor.clip_g_preprocessor)]


def _rows(task: Any, words: Mapping[str, str]) -> list[Trained]:
  """The words in the tables of both CLIPs; T5, if there is one, spells them."""
  found = []
  for clip, tokenizer in zip(
    (task.backbone.clip_l, task.backbone.clip_g), _tokenizers(task), strict=True
  ):
    ids = [tokenizer.token_to_id(f"{word}</w>") for word in words]
    found.append(Trained(clip.embedding.token_embedding.embeddings, np.array(ids)))
  return found


def make_stage(
  task: Any,
  config: TuningConfig,
  trained: Mapping[str, Trained],
  examples: Examples,
  prior: Examples | None,
  mesh: Any,
) -> loop.Stage:
  """The stage that trains parts of the model, in float32 whatever the model is."""
  backbone = task.backbone
  replaced = {id(part.variable) for part in trained.values() if part.is_whole}
  kept = [variable for variable in backbone.variables if id(variable) not in replaced]
  optimizer = train_state.make_optimizer(config.optimizer, config.num_steps)
  sets = {"real": _told(task, examples)}
  if prior is not None and config.needs_prior:
    sets["prior"] = _told(task, prior)
  error = _flow_error(backbone, trained, kept)

  def init(key, _):
    params = {name: part.begin() for name, part in trained.items()}
    return train_state.create(key, params, optimizer)

  def batch(state, shared, _):
    key = stream(state.key, "batch", state.step)
    return {
      name: _drawn(stream(key, name), told, config.batch_size)
      for name, told in shared["sets"].items()
    }

  def step(state, shared, per_seed):
    drawn = batch(state, shared, per_seed)

    def loss_of(params):
      losses = {
        name: error(params, shared["kept"], *rows, stream(state.key, name, state.step))
        for name, rows in drawn.items()
      }
      return losses["real"] + config.prior_weight * losses.get("prior", 0.0), losses

    (loss, losses), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    state = train_state.apply_gradients(state, gradients, optimizer)
    return state, {"loss": loss} | (losses if len(losses) > 1 else {})

  shared = {"kept": [v.value for v in kept], "sets": sets}
  return loop.Stage(
    name="tuning",
    num_steps=config.num_steps,
    init=init,
    batch=batch,
    step=step,
    evaluate=None,
    shared=mesh_lib.replicate(mesh, shared),
    per_seed=(),
    batch_size=config.batch_size,
    one_by_one=mesh_lib.one_by_one(mesh),
  )


def _told(task: Any, examples: Examples) -> _Told:
  known, prompt = np.unique(np.array(examples.prompts), return_inverse=True)
  tokens = task.preprocessor.generate_preprocess(known.tolist())
  side, latents = task.backbone.image_shape[0], []
  for start in range(0, len(examples.images), _BATCH):  # large images are many bytes
    rows = [Image.fromarray(image) for image in examples.images[start : start + _BATCH]]
    rows = np.stack([resize_and_crop(image, side) for image in rows])
    latents.append(_encoded(task.backbone, rows))
  classes, labels = np.unique(examples.labels, return_inverse=True)
  return _Told(
    latents=np.concatenate(latents),
    tokens={name: np.asarray(ids, np.int32) for name, ids in tokens.items()},
    prompt=prompt.astype(np.int32),
    by_class=group_by_class(labels, len(classes)),
  )


def _encoded(backbone: Any, images: np.ndarray) -> np.ndarray:
  """The mean of the autoencoder's latents, scaled as the diffuser has them."""
  moments = backbone.vae.encoder(images.astype(np.float32) / 127.5 - 1, training=False)
  mean = np.split(np.asarray(moments, np.float32), 2, axis=-1)[0]
  return np.asarray(backbone.image_rescaling(mean), np.float32)


def _drawn(key: jax.Array, told: _Told, size: int) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(latents [B, ...], tokens {name: [B, L]}) of images, each class as often as any other."""
  classes = told.by_class.counts.shape[0]
  labels = jax.random.randint(stream(key, "class"), (size,), 0, classes)
  index = draw_members(stream(key, "member"), told.by_class, labels)
  rows = told.prompt[index]
  return told.latents[index], {name: ids[rows] for name, ids in told.tokens.items()}


def _flow_error(backbone: Any, trained: Mapping[str, Trained], kept: list) -> Callable:
  """(params, values of `kept`, latents [B, ...], tokens, key) -> squared error of the velocity."""
  import keras

  parts = {id(part.variable): name for name, part in trained.items() if not part.is_whole}
  whole = {name: part.variable for name, part in trained.items() if part.is_whole}

  def values_of(params, values):
    """[(variable, value)] of all, as the model computes with them."""
    for name, variable in whole.items():
      yield variable, params[name].astype(variable.dtype)
    for variable, value in zip(kept, values, strict=True):
      name = parts.get(id(variable))
      yield variable, trained[name].put(value, params[name]) if name else value

  def error(params, values, latents, tokens, key):
    with keras.StatelessScope(state_mapping=list(values_of(params, values))):
      embeddings = backbone.encode_text_step(tokens, tokens)
      noise = jax.random.normal(stream(key, "noise"), latents.shape)
      sigma = jax.nn.sigmoid(jax.random.normal(stream(key, "time"), latents.shape[:1]))
      share = sigma[:, None, None, None]
      velocity = backbone.diffuser({
        "latent": (1 - share) * latents + share * noise,
        "context": embeddings[0],
        "pooled_projection": embeddings[2],
        "timestep": 1000 * sigma,
      })  # fmt: skip
    return jnp.square(velocity.astype(jnp.float32) - (noise - latents)).mean()

  return error
