"""Learning-rate schedule and AdamW, as in the published training."""

import dataclasses
from typing import Any

import jax
import optax

from llm2vec_gen_jax.config import OptimizerConfig
from llm2vec_gen_jax.model.compressor import HEADS


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up from 0, then linear, constant or cosine."""
    peak, rest = config.learning_rate, max(config.schedule_steps - config.warmup_steps, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, config.warmup_steps), after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns the optimizer: clipping by global norm, then AdamW without weight decay on biases.

    With head_learning_rate, the two heads have a learning rate of their own.
    """
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "bias", params)

    if config.head_learning_rate is None:
        return optax.chain(clip, optax.adamw(make_schedule(config), weight_decay=config.weight_decay, mask=decays))

    def part(params: Any) -> Any:
        return {name: "head" if name in HEADS else "other" for name in params}

    head = dataclasses.replace(config, learning_rate=config.head_learning_rate)
    rates = {"other": make_schedule(config), "head": make_schedule(head)}
    scales = {name: optax.scale_by_learning_rate(rate) for name, rate in rates.items()}
    decay = optax.add_decayed_weights(config.weight_decay, decays)
    return optax.chain(clip, optax.scale_by_adam(), decay, optax.multi_transform(scales, part))
