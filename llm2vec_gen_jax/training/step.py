"""The training step: a pure function of state, frozen backbone and batch, and how it becomes a program."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import LossConfig, PlanConfig, TrainConfig, TrainSettings
from llm2vec_gen_jax.model.attention import KVCache
from llm2vec_gen_jax.model.layers import Dropout
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.training.losses import loss_fn
from llm2vec_gen_jax.training.optimizer import make_optimizer
from llm2vec_gen_jax.training.step_memory import chunk_tokens

Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """Training state: step (int32), trainable tree and optimizer state (float32)."""

    step: jax.Array
    trainable: Any
    opt_state: Any


def new_state(trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the initial TrainState."""
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable))


def update(
    state: TrainState, value: jax.Array, metrics: Metrics, gradients: Any, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One optimizer step. value: of the loss, a float32 scalar. metrics: scalars.

    Returns (new state, metrics of this step). The state is unchanged if the loss or a gradient is not finite.
    """
    norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
    updated = TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    return state, {"loss": value, **metrics, "grad_norm": norm}


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Mapping[str, Any],
    *,
    model: LLM2VecGenModel,
    optimizer: optax.GradientTransformation,
    loss_config: LossConfig,
    lora_dropout: float = 0.0,
    seed: int = 0,
    microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update on a batch of `losses.loss_fn`. Returns (new state, metrics of this step).

    `frozen` is an argument, neither differentiated nor donated nor a constant of the program.
    microbatches: parts of the batch whose losses and gradients are computed one after the other; the result is that of
    the whole batch, up to rounding and the random numbers of dropout.
    """

    def loss(trainable: Any, part: Mapping[str, Any], number: jax.Array | None) -> tuple[jax.Array, Metrics]:
        dropout = None
        if lora_dropout:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            key = key if number is None else jax.random.fold_in(key, number)
            dropout = Dropout(jax.random.split(key, model.architecture.num_layers), lora_dropout, 0.0)
        return loss_fn(trainable, model, frozen, part, loss_config, dropout)

    gradient = functools.partial(jax.value_and_grad(loss, has_aux=True), state.trainable)
    if microbatches == 1:
        (value, metrics), gradients = gradient(batch, None)
    else:
        parts = split_batch(batch, microbatches), jnp.arange(microbatches)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, *first))
        total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, gradient(*part)), None), zeros, parts)
        (value, metrics), gradients = jax.tree.map(lambda x: x / microbatches, total)
    return update(state, value, metrics, gradients, optimizer)


def check_batch_size(settings: TrainSettings, shards: int) -> None:
    """Raises InputError if a batch cannot be split over data shards and microbatches."""
    size, parts = settings.batch_size, settings.microbatches
    if size % (shards * parts):
        over = [f"{shards} data shards"] * (shards > 1) + [f"train.microbatches={parts}"] * (parts > 1)
        raise InputError(f"train.batch_size={size} is not divisible by {' x '.join(over)}")


def check_microbatches(config: TrainConfig | PlanConfig) -> None:
    """Raises InputError for microbatches that do not divide a batch, or with losses that compare all of its rows."""
    check_batch_size(config.train, 1)
    for key in ("margin", "contrastive"):
        if config.train.microbatches > 1 and getattr(config.loss, key):
            raise InputError(
                f"train.microbatches={config.train.microbatches}: loss.{key} compares all rows of a batch; pass "
                f"train.microbatches=1 or loss.{key}=0"
            )


def split_batch(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Returns the parts of a batch, stacked on a leading axis, each with every count-th row.

    A device that holds a block of the rows holds its rows of every part. answer_tokens is added: the answer tokens of
    a part if they were the same in all, by which a part divides its sum, so that the mean over the parts is that of
    the batch.
    """
    size = len(batch["query_lengths"])

    def split(x: jax.Array, axis: int) -> jax.Array:
        before, rows, after = x.shape[:axis], x.shape[axis] // size, x.shape[axis + 1 :]
        x = x.reshape(*before, size // count, count, rows, *after)
        return jnp.moveaxis(x, axis + 1, 0).reshape(count, *before, size // count * rows, *after)

    parts = {}
    for name, value in batch.items():
        axis = 1 if isinstance(value, KVCache) else 0  # after the layers
        parts[name] = jax.tree.map(functools.partial(split, axis=axis), value)
    if "answer_lengths" not in batch:
        return parts
    tokens = jnp.maximum(batch["answer_lengths"].sum(), 1) / count
    return parts | {"answer_tokens": jnp.broadcast_to(tokens, count)}


def jit_step(config: TrainConfig | PlanConfig, model: LLM2VecGenModel) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `train_step` of a config as a jitted function of (state, frozen, batch).

    The state is donated and replicated; the frozen backbone keeps its sharding.
    """
    check_microbatches(config)
    execution = model.execution
    chunk = config.loss.chunk_tokens or chunk_tokens(model.architecture, execution)
    step = functools.partial(
        train_step,
        model=model,
        optimizer=make_optimizer(config.optimizer),
        loss_config=dataclasses.replace(config.loss, chunk_tokens=chunk),
        lora_dropout=config.lora.dropout if config.lora.rank else 0.0,
        seed=config.train.seed,
        microbatches=config.train.microbatches,
    )
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=execution.mesh and sharding.replicated(execution.mesh),
        compiler_options=execution.compiler_options,
    )


def jit_losses(config: TrainConfig, model: LLM2VecGenModel) -> Callable[..., Metrics]:
    """Returns the losses of a config as a jitted function of (trainable, frozen, batch): {"loss": x, "NAME_loss": y}.

    Without dropout and gradients.
    """
    execution = model.execution
    chunk = config.loss.chunk_tokens or chunk_tokens(model.architecture, execution)
    loss_config = dataclasses.replace(config.loss, chunk_tokens=chunk)

    def losses(trainable: Any, frozen: Any, batch: Mapping[str, Any]) -> Metrics:
        loss, parts = loss_fn(trainable, model, frozen, batch, loss_config)
        return {"loss": loss, **parts}

    return jax.jit(
        losses,
        out_shardings=execution.mesh and sharding.replicated(execution.mesh),
        compiler_options=execution.compiler_options,
    )


def jit_prefill(model: LLM2VecGenModel, slots: int | None = None) -> Callable[..., KVCache]:
    """Returns `model.prefill` as a jitted function of (frozen, ids, lengths). slots: default the padded length."""
    execution = model.execution
    return jax.jit(
        functools.partial(model.prefill, slots=slots),
        out_shardings=execution.mesh and sharding.cache_sharding(execution.mesh),
        compiler_options=execution.compiler_options,
    )


def abstract_cache(jitted: Callable[..., KVCache], mesh: jax.sharding.Mesh | None, *arguments: Any) -> KVCache:
    """Returns the ShapeDtypeStructs of what a `jit_prefill` returns."""
    put = mesh and sharding.cache_sharding(mesh)
    cache: KVCache = jax.eval_shape(jitted, *arguments)
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=put), cache)
    return cache
