"""Compile time of the training step, and whether its backward pass copies the frozen weights.

    python -m benchmarks.compile_time

Compiles, without running, the step of a small Llama model with 12 and with 48 layers, five times each in alternation.
Prints medians of trace + compile time, and XLA's memory analysis of the program compared with the size of the weights.
"""

import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm2vec_gen_jax import config
from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.backbone import abstract_params
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.training.optimizer import make_optimizer
from llm2vec_gen_jax.training.step import new_state, train_step

ROUNDS = 5


def compile_step(layers, hidden_size=128, B=8, length=64):
    """Returns (seconds, compiled step, bytes of the frozen weights) for B queries and answers of that length."""
    T = S = length
    architecture = Architecture(
        vocab_size=2048,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=hidden_size // 4,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        qkv_bias=False,
        qk_norm=False,
        tied_embeddings=True,
    )
    model = LLM2VecGenModel(architecture, 10, 0, hidden_size)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), nn.unbox(abstract_params(architecture)))
    optimizer = make_optimizer(config.OptimizerConfig())

    def fresh():
        trainable = model.compressor.init(jax.random.key(0), jnp.zeros((1, 10, hidden_size)))["params"]
        return new_state(trainable, optimizer)

    batch = {
        "query_lengths": jax.ShapeDtypeStruct((B,), jnp.int32),
        "answer": jax.ShapeDtypeStruct((B, S), jnp.int32),
        "answer_lengths": jax.ShapeDtypeStruct((B,), jnp.int32),
        "target": jax.ShapeDtypeStruct((B, hidden_size), jnp.float32),
    }
    ids_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch["query"] = jax.eval_shape(lambda *texts: model.prefill(*texts, T), frozen, ids_BT, batch["query_lengths"])
    loss_config = config.LossConfig()

    def step(state, frozen, batch):  # a new function each time: nothing is remembered
        return train_step(state, frozen, batch, model=model, optimizer=optimizer, loss_config=loss_config)

    state = jax.eval_shape(fresh)
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    seconds = time.perf_counter() - started
    return seconds, compiled, sum(x.size * 4 for x in jax.tree.leaves(frozen))


def main():
    jax.config.update("jax_enable_compilation_cache", False)
    compile_step(2)  # warms up the compiler
    times = {12: [], 48: []}
    for _ in range(ROUNDS):
        for layers in times:
            times[layers].append(compile_step(layers)[0])
    medians = {layers: statistics.median(seconds) for layers, seconds in times.items()}
    print(f"compile time of the training step, medians of {ROUNDS}:")
    for layers, seconds in medians.items():
        print(f"  {layers:>3} layers  {seconds:6.2f} s")
    print(f"  ratio       {medians[48] / medians[12]:6.2f}")
    print("XLA's memory analysis of the step of a 24-layer model of width 768 (would include a copy of the weights):")
    for B, length in ((8, 64), (1, 8)):
        _, compiled, frozen_bytes = compile_step(24, 768, B, length)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        print(
            f"  {B} rows of {length:>2} tokens: frozen weights {frozen_bytes / 2**20:.0f} MiB, "
            f"temporaries {temporary / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
