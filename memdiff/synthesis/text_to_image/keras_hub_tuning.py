"""LoRA of Stable Diffusion 3 in KerasHub, by the one training loop.

The objective is that of the model: rectified flow with logit-normal times (Esser et al. 2024,
equations 13 and 19). Only the matrices of LoRA are trained. Keras' variables are replaced by
function arguments, so that the step is pure.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from input_pipeline.batches import ByClass, draw_members, group_by_class
from input_pipeline.lazy_images import resize_and_crop
from memdiff.errors import ConfigError
from memdiff.runtime import distributed, loop, train_state
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import stream
from memdiff.synthesis.text_to_image.tuning import Examples, TuningConfig

LAYERS = ("attention_qkv", "attention_qkv2", "attention_proj", "attention_proj2")
_FILE = "diffuser.lora.h5"
_BATCH = 8  # images that are encoded at a time


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
  """Trains LoRA of a `keras_hub.models.TextToImage`, or reads what was trained in `folder`.

  Args:
    task: the model, which is changed.
    config: rank, steps, optimiser, weight of the prior.
    examples: real images.
    prior: images of the same classes that the model drew before; None: none.
    run: of the loop; its first seed is trained.
    folder: of checkpoints and of the weights, in KerasHub's own format.
  """
  enable(task.backbone, config.rank)
  path = folder / _FILE
  if path.exists():
    task.backbone.load_lora_weights(str(path))
    return
  stage = make_stage(task, config, examples, prior, run.mesh)
  state = loop.train(stage, run, folder)
  for name, variable in adapted(task.backbone).items():
    variable.assign(np.asarray(state.params[name][0]))
  if distributed.is_main():
    task.backbone.save_lora_weights(str(path))
  distributed.barrier(str(path))


def adapted(backbone: Any) -> dict[str, Any]:
  """The variables of LoRA in the diffuser, by name."""
  found = [v for v in backbone.diffuser.variables if "lora" in v.path]
  return {f"lora_{number:03d}": variable for number, variable in enumerate(found)}


def enable(backbone: Any, rank: int) -> None:
  """Adds LoRA to the attention of the diffuser.

  Raises:
    ConfigError: if the diffuser has no attention of the known names.
  """
  backbone.enable_lora(rank, target_layer_names=list(LAYERS))
  if not adapted(backbone):
    raise ConfigError(
      "config.text_to_image.tuning.rank is above 0, but LoRA finds no attention in the diffuser of"
      " this model; set it to 0."
    )


def make_stage(
  task: Any, config: TuningConfig, examples: Examples, prior: Examples | None, mesh: Any
) -> loop.Stage:
  """The stage of LoRA that was enabled before; its parameters are float32 whatever the model is."""
  backbone = task.backbone
  trained = adapted(backbone)
  known = {id(variable) for variable in trained.values()}
  frozen = [variable for variable in backbone.variables if id(variable) not in known]
  optimizer = train_state.make_optimizer(config.optimizer, config.num_steps)
  sets = {"real": _told(task, examples)}
  if prior is not None and config.prior_weight:
    sets["prior"] = _told(task, prior)
  error = _flow_error(backbone, trained, frozen)

  def init(key, _):
    params = {name: jnp.asarray(v.value, jnp.float32) for name, v in trained.items()}
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
        name: error(params, shared["frozen"], *rows, stream(state.key, name, state.step))
        for name, rows in drawn.items()
      }
      return losses["real"] + config.prior_weight * losses.get("prior", 0.0), losses

    (loss, losses), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    state = train_state.apply_gradients(state, gradients, optimizer)
    return state, {"loss": loss} | (losses if len(losses) > 1 else {})

  shared = {"frozen": [v.value for v in frozen], "sets": sets}
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


def _flow_error(backbone: Any, trained: dict[str, Any], frozen: list) -> Callable:
  """(params, frozen values, latents [B, ...], tokens, key) -> squared error of the velocity."""
  import keras

  def error(params, values, latents, tokens, key):
    mapping = [(v, params[name].astype(v.dtype)) for name, v in trained.items()]
    with keras.StatelessScope(state_mapping=[*mapping, *zip(frozen, values, strict=True)]):
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
