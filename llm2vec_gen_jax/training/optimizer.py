"""Learning-rate schedule and AdamW, as in the published training."""

from typing import Any

import jax
import optax

from llm2vec_gen_jax.config import OptimizerConfig


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
    """Returns the optimizer: clipping by global norm, then AdamW without weight decay on biases."""
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "bias", params)

    return optax.chain(clip, optax.adamw(make_schedule(config), weight_decay=config.weight_decay, mask=decays))
