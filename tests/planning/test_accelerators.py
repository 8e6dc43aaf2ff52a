"""Every program, lowered and compiled for NVIDIA GPUs by XLA's own GPU compiler, which needs no GPU.

pip install -r requirements-gpu-compiler.txt
python -m pytest tests/planning/test_accelerators.py              # a tiny model
python -m pytest -m slow tests/planning/test_accelerators.py      # real shapes on every kind of GPU
"""

import functools
import importlib.util
import itertools
import os
import re

import jax
import jax.numpy as jnp
import pytest

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.inference.generate import batch_rows, unrolls
from llm2vec_gen_jax.model.attention import CAUSAL, AttentionMask, attend
from llm2vec_gen_jax.model.backbone import Backbone
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.parallel import memory
from llm2vec_gen_jax.planning.hlo import moved_bytes
from llm2vec_gen_jax.planning.topologies import compiling_for, described_devices
from tests.helpers.abstract_programs import Programs, architecture

DTYPES = ("bfloat16", "float16", "float32", "int8")
GIB = 2**30
# find_spec imports the parent package, which may be absent too.
absent = not (importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13"))
pytestmark = pytest.mark.skipif(
    absent and not os.environ.get("CI"), reason="pip install -r requirements-gpu-compiler.txt"
)


@functools.cache
def devices(topology):
    return tuple(described_devices(topology)[0])


@pytest.fixture
def h100():
    """One H100 that is described, not attached."""
    with compiling_for(devices("h100:1")):
        yield devices("h100:1")


def kernels(text):
    """The cuDNN attention kernels of a lowered or compiled program: (forward passes, backward passes)."""
    forward = re.findall(r"__cudnn\$fmha(?:ScaleBias)?Softmax\b(?!Backward)", text)
    return len(forward), text.count("SoftmaxBackward")


# Lowering: lengths, tokens, LoRA, losses, dtypes


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("K", [1, 10, 20])
@pytest.mark.parametrize("T, S", [(8, 8), (64, 96), (72, 129), (127, 65)])
def test_a_training_step_lowers_for_every_length(h100, T, S, K, rank):
    programs = Programs(h100, num_tokens=K, num_thought_tokens=20 - K, lora_rank=rank, T=T, S=S)
    jitted, arguments = programs.step()
    forward, backward = kernels(jitted.lower(*arguments).as_text())
    fused = (K + S >= 64) + bool(rank and T + 20 >= 64)  # the decoder; with a LoRA the encoder is differentiated too
    assert backward == fused and forward == 2 * fused  # the backward pass computes the forward one again


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_program_lowers_in_every_dtype(h100, dtype, rank):
    """float32 is multiplied as float32: the default is TF32 on NVIDIA GPUs, and bfloat16 on TPUs."""
    for name, jitted, arguments in Programs(h100, dtype=dtype, lora_rank=rank).every():
        text = jitted.lower(*arguments).as_text()
        assert text
        if dtype == "float32":
            products = re.findall(r"stablehlo\.dot_general.*", text)
            rounded = [line for line in products if "HIGHEST, HIGHEST" not in line]
            assert not rounded, (name, rounded[:3])


@pytest.mark.parametrize("T", [64, 65])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_over_odd_lengths_has_gradients(h100, causal, T):
    programs = Programs(h100, B=2)
    visibility = CAUSAL if causal else AttentionMask(causal=False, lengths_B=jnp.array([3, T]))

    def loss(q):
        return attend(q, q, q, visibility, None, programs.execution).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss)).lower(programs.rows(T, 4, 64, dtype=jnp.bfloat16)).as_text()
    assert kernels(text)[1] == 1


# Compiling: a tiny model for an H100


def test_compiled_programs_hold_flash_attention_forward_and_backward(h100):
    programs = Programs(h100)
    expected = {"prefix": (1, 0), "losses": (1, 0), "step": (2, 1), "encode": (1, 0), "teacher": (1, 0)}
    for name, counts in expected.items():
        jitted, arguments = getattr(programs, name)()
        assert kernels(jitted.lower(*arguments).compile().as_text()) == counts, name


def test_the_decode_loop_reads_weights_and_cache_in_place(h100):
    """A scan over the layers copies each layer's weights first: three times the traffic of decoding."""
    jitted, arguments = Programs(h100).generate()
    text = jitted.lower(*arguments).compile().as_text()
    assert kernels(text) == (1, 0)  # the prompts' pass
    bodies = re.findall(r"\n%?([\w.-]+) \([^\n]*\) -> [^\n]* \{\n(.*?)\n\}", text, re.S)
    body = next(lines for name, lines in bodies if f"body=%{name}" in text and "[8,128]{1,0} " in lines)
    loops = re.findall(r" while\(", body)
    copies = re.findall(r"= bf16\[[\d,]*(?:128,256|256,128|128,4,64|4,64,128|128,2,64)\][^=]* (?:copy|fusion)\(", body)
    assert not loops and not copies


@pytest.mark.parametrize(
    "name, topology, sizes, unrolled",
    [
        ("qwen3-8b", "h100:1", (1, 1, 1), True),
        ("qwen3-8b", "l4:1", (1, 1, 1), False),
        ("qwen3-8b", "h100:8", (1, 8, 1), True),
        ("llama3-70b", "h100:8", (1, 8, 1), False),  # gathered, the layers alone exceed a device
    ],
)
def test_decoding_is_unrolled_where_a_copy_of_the_layers_fits(name, topology, sizes, unrolled):
    with compiling_for(devices(topology)):
        programs = Programs(devices(topology), sizes, architecture(name))
        backbone = Backbone(programs.architecture, programs.execution)
        assert unrolls(backbone, programs.frozen, 32, 1024) == unrolled


def test_one_text_is_decoded_in_a_batch_of_two():
    """XLA multiplies a single row by way of a float32 copy of the weight."""
    assert batch_rows(1, Execution(platform="gpu")) == 2 and batch_rows(1, Execution(platform="cpu")) == 1


def test_devices_exchange_half_precision_in_tensor_parallel_layers():
    two = devices("h100:2")
    with compiling_for(two):
        programs = Programs(two, (1, 1, 2))
        jitted, arguments = programs.step()
        text = jitted.lower(*arguments).compile().as_text()
    sums = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    wide = [shape for shape in sums if re.search(r"f32\[(?:\d+,)*(?:64|74),128\]", shape)]
    assert sums and not wide


def test_adapters_are_merged_without_a_second_copy(h100):
    programs = Programs(h100, architecture=architecture("smollm2-135m"))
    jitted, arguments = programs.merge()
    given, beside = memory.program_bytes(jitted.lower(*arguments).compile())
    kernel = memory.bytes_per_device(arguments[0])
    assert beside < kernel / 4


# What a device does not support


def test_kernels_follow_the_device():
    half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")

    def chosen(topology, head_dim=64, dtype=half):
        return Programs(devices(topology)).execution.attention_kernel(512, head_dim, dtype, False, False)

    assert chosen("h100:1") == chosen("a100:1") == chosen("b200:1") == chosen("l4:1") == "cudnn"
    assert chosen("t4:1") == chosen("h100:1", dtype=single) == "xla"
    assert chosen("h100:1", head_dim=256) == "cudnn" and chosen("a100:1", head_dim=256) == "xla"


@pytest.mark.parametrize(
    "topology, head_dim, dtype, reason",
    [
        ("t4:1", 64, "bfloat16", "needs an NVIDIA GPU of compute capability 8.0 or later"),
        ("h100:1", 64, "float32", "supports float16 and bfloat16, not float32"),
        ("a100:1", 256, "bfloat16", "supports head sizes that are multiples of 8 up to 128, not 256"),
        ("h100:1", 60, "bfloat16", "supports head sizes that are multiples of 8 up to 256, not 60"),
    ],
)
def test_a_kernel_that_does_not_take_the_backbone_is_refused(topology, head_dim, dtype, reason):
    execution = Programs(devices(topology), attention="cudnn").execution
    with pytest.raises(InputError, match=f"kernels.attention=cudnn: {reason}.*; pass kernels.attention=auto"):
        execution.check(head_dim, dtype)


# Real shapes


SHAPES = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama3.2-1b", "qwen2.5-7b", "qwen3-8b", "llama3.1-8b")
ONE = [(name, f"{kind}:1", (1, 1, 1)) for name, kind in itertools.product(SHAPES, ("h100", "a100", "l4", "b200"))]
SEVERAL = [(name, "h100:2", (1, 1, 2)) for name in SHAPES if name != "smollm2-135m"]  # 3 key/value heads
SEVERAL += [(name, "h100:8", sizes) for name in SHAPES for sizes in ((8, 1, 1), (1, 8, 1))]


@pytest.mark.slow
@pytest.mark.parametrize("name, topology, sizes", ONE + SEVERAL, ids=str)
def test_real_shapes_compile(name, topology, sizes):
    """Whether they fit is another question: the compiler reports what they take."""
    with compiling_for(devices(topology)):
        programs = Programs(devices(topology), sizes, architecture(name), remat="block", T=512, S=512)
        for part in ("prefix", "step", "encode", "teacher", "generate"):
            jitted, arguments = getattr(programs, part)()
            text = jitted.lower(*arguments).compile().as_text()
            assert kernels(text)[0], part
            assert moved_bytes(text) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, rank", [("smollm2-135m", 0), ("qwen2.5-0.5b", 8)])
def test_every_program_compiles(h100, name, rank, dtype):
    programs = Programs(h100, architecture=architecture(name), dtype=dtype, lora_rank=rank)
    for _, jitted, arguments in programs.every():
        assert jitted.lower(*arguments).compile().as_text()
