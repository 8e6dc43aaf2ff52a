"""Train state and one optimizer update."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """All that changes: step (int32), trainable tree and optimizer state (float32)."""

    step: jax.Array
    trainable: Any
    opt_state: Any


def new_state(trainable, optimizer):
    """Returns the TrainState before the first step."""
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable))


def update(state, loss, optimizer):
    """One step down the gradient of `loss(trainable) -> (float32 scalar, {name: scalar})`.

    Returns (new state, metrics of this step). A non-finite loss or gradient leaves the state as it was.
    """
    (value, parts), gradients = jax.value_and_grad(loss, has_aux=True)(state.trainable)
    norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
    updated = TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)
    sound = jnp.isfinite(value) & jnp.isfinite(norm)
    kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, state)
    return kept, {"loss": value, **parts, "grad_norm": norm}
