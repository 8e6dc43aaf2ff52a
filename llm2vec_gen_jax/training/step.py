"""The training step: a pure function of state, frozen backbone and batch, and how it becomes a program."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from llm2vec_gen_jax.config import LossConfig, PlanConfig, TrainConfig
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
    state: TrainState, loss: Callable[[Any], tuple[jax.Array, Metrics]], optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One optimizer step on `loss(trainable) -> (float32 scalar, {name: scalar})`.

    Returns (new state, metrics of this step). The state is unchanged if the loss or a gradient is not finite.
    """
    (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.trainable)
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
) -> tuple[TrainState, Metrics]:
    """One update on a batch of `losses.loss_fn`. Returns (new state, metrics of this step).

    `frozen` is an argument, neither differentiated nor donated nor a constant of the program.
    """
    dropout = None
    if lora_dropout:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        dropout = Dropout(jax.random.split(key, model.architecture.num_layers), lora_dropout, 0.0)
    return update(state, lambda t: loss_fn(t, model, frozen, batch, loss_config, dropout), optimizer)


def jit_step(config: TrainConfig | PlanConfig, model: LLM2VecGenModel) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `train_step` of a config as a jitted function of (state, frozen, batch).

    The state is donated and replicated; the frozen backbone keeps its sharding.
    """
    execution = model.execution
    chunk = config.loss.chunk_tokens or chunk_tokens(model.architecture, execution)
    step = functools.partial(
        train_step,
        model=model,
        optimizer=make_optimizer(config.optimizer),
        loss_config=dataclasses.replace(config.loss, chunk_tokens=chunk),
        lora_dropout=config.lora.dropout if config.lora.rank else 0.0,
        seed=config.train.seed,
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


def jit_prefill(model: LLM2VecGenModel, slots: int) -> Callable[..., KVCache]:
    """Returns `model.prefill`, padded to a number of slots, as a jitted function of (frozen, ids, lengths)."""
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
