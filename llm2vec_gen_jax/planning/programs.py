"""Compiles the programs of training, encoding and generation from abstract inputs."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm2vec_gen_jax.config import PlanConfig
from llm2vec_gen_jax.inference.generate import Sampling, continue_prompts, unrolls
from llm2vec_gen_jax.model import quantization
from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.backbone import Backbone, abstract_params
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel, Packed
from llm2vec_gen_jax.parallel import memory, sharding
from llm2vec_gen_jax.planning.flops import forward_flops, training_flops
from llm2vec_gen_jax.planning.hlo import moved_bytes
from llm2vec_gen_jax.pretrained.backbone import resolve_dtype
from llm2vec_gen_jax.training.optimizer import make_optimizer
from llm2vec_gen_jax.training.step import abstract_cache, check_batch_size, jit_prefill, jit_step, new_state


@dataclasses.dataclass
class Program:
    """A compiled program; all sizes are bytes per device.

    arguments: its arguments. allocated: outputs and temporaries, without donated arguments. moved: received from other
    devices.
    """

    compiled: Any
    arguments: int
    allocated: int
    moved: float

    @property
    def peak(self) -> int:
        """Memory in use while the program runs."""
        return self.arguments + self.allocated


def weight_dtype(config: PlanConfig) -> jnp.dtype:
    """Returns the dtype of most weights."""
    name = config.backbone.dtype
    return jnp.dtype("bfloat16" if name == "auto" and config.topology else resolve_dtype(name))


def abstract_inputs(
    config: PlanConfig, architecture: Architecture, execution: Execution
) -> tuple[LLM2VecGenModel, dict[str, Any]]:
    """Returns the model and the abstract arguments of its programs by name."""
    mesh: Any = execution.mesh
    a, B, T, S = architecture, config.train.batch_size, config.query_length, config.answer_length
    scale = config.lora.alpha / config.lora.rank if config.lora.rank else 0.0
    compression = config.compression
    model = LLM2VecGenModel(
        a, compression.num_tokens, compression.num_thought_tokens, a.hidden_size, config.lora.rank, scale, execution
    )
    check_batch_size(config.train, sharding.batch_shards(mesh))

    def rows(dtype, *shape):
        return jax.ShapeDtypeStruct((B, *shape), dtype, sharding=sharding.batch_sharding(mesh))

    def replicated(tree):
        placement = sharding.replicated(mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), tree)

    boxed, quantized = abstract_params(a), weight_dtype(config) == jnp.int8
    frozen = jax.tree.map(
        lambda x, placement: jax.ShapeDtypeStruct(
            x.shape, jnp.bfloat16 if quantized else weight_dtype(config), sharding=placement
        ),
        nn.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )
    frozen = quantization.describe(frozen) if quantized else frozen
    trainable = jax.eval_shape(model.init, jax.random.key(0), frozen)
    optimizer = make_optimizer(config.optimizer)
    batch = {
        "query_lengths": rows(jnp.int32),
        "answer": rows(jnp.int32, S),
        "answer_lengths": rows(jnp.int32),
        "target": rows(jnp.float32, a.hidden_size),
    }
    ids = rows(jnp.int32, T)
    return model, {
        "frozen": frozen,
        "trainable": replicated(trainable),
        "state": replicated(jax.eval_shape(functools.partial(new_state, optimizer=optimizer), trainable)),
        "ids": ids,
        "batch": batch,
        "packed": Packed(ids, ids, ids, rows(jnp.int32, max(T // model.num_appended, 1))),
    }


def _jit_functions(config: PlanConfig, model: LLM2VecGenModel, frozen: Any) -> dict[str, Any]:
    """Returns newly jitted functions by name; a trace for one platform cannot be reused for another."""
    backbone = Backbone(model.architecture, model.execution)
    unroll = unrolls(backbone, frozen, config.train.batch_size, config.query_length + config.answer_length)
    sampling, options = Sampling(config.answer_length), model.execution.compiler_options
    return {
        "prefix": jit_prefill(model, config.query_length),
        "step": jit_step(config, model),
        "encode": jax.jit(functools.partial(model.encode_packed, soft_prompts=False), compiler_options=options),
        "generate": jax.jit(
            functools.partial(continue_prompts, backbone, sampling, (0,), unroll), compiler_options=options
        ),
    }


def compile_programs(config: PlanConfig, model: LLM2VecGenModel, inputs: Mapping[str, Any]) -> dict[str, Program]:
    """Returns the compiled programs by name: prefix (the prefill of queries, absent with LoRA), step, encode, generate.

    inputs: see abstract_inputs.
    """
    functions = _jit_functions(config, model, inputs["frozen"])
    programs = {}
    for name, arguments in _arguments(config, functions, inputs, model.execution.mesh).items():
        compiled = functions[name].lower(*arguments).compile()
        size, allocated = memory.program_bytes(compiled)
        programs[name] = Program(compiled, size, allocated, moved_bytes(compiled.as_text()))
    return programs


def _arguments(
    config: PlanConfig, functions: Mapping[str, Any], inputs: Mapping[str, Any], mesh: jax.sharding.Mesh | None
) -> dict[str, tuple[Any, ...]]:
    """Returns the abstract arguments of each function by name."""
    frozen, query = inputs["frozen"], inputs["ids"]
    arguments: dict[str, tuple[Any, ...]] = {}
    if not config.lora.rank:
        arguments["prefix"] = frozen, inputs["ids"], inputs["batch"]["query_lengths"]
        query = abstract_cache(functions["prefix"], mesh, *arguments["prefix"])
    arguments["step"] = inputs["state"], frozen, inputs["batch"] | {"query": query}
    arguments["encode"] = inputs["trainable"], frozen, inputs["packed"]
    lengths, seed = inputs["batch"]["query_lengths"], jax.ShapeDtypeStruct((), jnp.uint32)
    arguments["generate"] = frozen, inputs["ids"], lengths, lengths, seed
    return arguments


def lower_for_cuda(config: PlanConfig, architecture: Architecture, execution: Execution) -> None:
    """Raises if a program cannot be lowered for NVIDIA GPUs."""
    model, inputs = abstract_inputs(config, architecture, execution)
    functions = _jit_functions(config, model, inputs["frozen"])
    for name, arguments in _arguments(config, functions, inputs, execution.mesh).items():
        jax.export.export(functions[name], platforms=["cuda"])(*arguments)


def flops(config: PlanConfig, architecture: Architecture) -> tuple[float, float]:
    """Returns the FLOPs of a training step and of an encoding pass on batches of the longest texts."""
    B, compression = config.train.batch_size, config.compression
    queries, answers = [config.query_length] * B, [config.answer_length] * B
    return (
        training_flops(
            architecture,
            queries,
            answers,
            compression.num_tokens,
            compression.num_thought_tokens,
            bool(config.lora.rank),
        ),
        forward_flops(architecture, queries),
    )
