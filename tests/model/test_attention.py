"""Every attention kernel gives what the reference gives: values and gradients, for all masks, groups and head sizes.

Pallas runs interpreted. cuDNN runs on NVIDIA's GPUs alone: elsewhere its calls are lowered for them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.model.attention import CAUSAL, SHARED, AttentionMask, KVCache, attend
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.model.layers import KEPT
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from tests.conftest import one_device_mesh

B, T, S = 2, 50, 33  # of no power of two, so that all of it is padded
MASKS = ("causal", "lengths", "prefix", "packed")
ALL_MASKS = (*MASKS, "shared")  # splash attention does not support the last
ON_GPU = jax.default_backend() == "gpu"


def inputs(mask, groups, head_dim, batch=B, G=2, dtype=np.float32, T=T):
    """Returns (arrays to differentiate, Visibility, number of real queries in every row)."""
    random = np.random.default_rng(groups + head_dim)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    arrays = [normal(batch, T, heads, head_dim) for heads in (groups * G, G, G)]
    if mask == "prefix":
        arrays += [normal(batch, G, S, head_dim), normal(batch, G, S, head_dim)]
        lengths_B = jnp.asarray(random.integers(0, S + 1, batch))
        return arrays, AttentionMask(causal=True, cache_BS=jnp.arange(S) < lengths_B[:, None]), T
    if mask in ("packed", "shared"):
        segments_BT = jnp.asarray(np.sort(random.integers(1, 5, (batch, T))), jnp.int32)
        if mask == "shared":
            segments_BT = segments_BT.at[:, :9].set(SHARED)
        return arrays, AttentionMask(causal=True, segments_BT=segments_BT), T
    if mask == "lengths":
        lengths_B = jnp.asarray([17, T] * (batch // 2), jnp.int32)
        return arrays, AttentionMask(causal=False, lengths_B=lengths_B), 17
    return arrays, CAUSAL, T


def softmax_attention(q_BTNH, k_BTGH, v_BTGH, mask, cache, execution):
    """Attention by its definition, differentiated by JAX."""
    B, T, N, H = q_BTNH.shape
    k_BTNH, v_BTNH = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BTGH, v_BTGH))
    before = np.arange(T)[:, None] >= np.arange(T)
    seen = before if mask.causal else (np.arange(T) < mask.lengths_B[:, None])[:, None, None]
    if mask.segments_BT is not None:
        segments_B11S = mask.segments_BT[:, None, None, :]
        seen = before & ((mask.segments_BT[:, None, :, None] == segments_B11S) | (segments_B11S == SHARED))
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH, precision="highest") * H**-0.5
    weights_BNTS = jax.nn.softmax(jnp.where(seen, scores_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v_BTNH, precision="highest")


def outcome(arrays, visibility, real, execution, attend=attend):
    """Returns (mixed, gradients) of attention over arrays."""

    def mix(q, k, v, *cache):
        cache = [x.astype(execution.storage_dtype(x.dtype)) for x in cache]
        return attend(q, k, v, visibility, KVCache(*cache) if cache else None, execution)[:, :real]

    def loss(*arrays):
        return jnp.sum(jnp.sin(mix(*arrays).astype(jnp.float32)))

    return jax.jit(mix)(*arrays), jax.jit(jax.grad(loss, tuple(range(len(arrays)))))(*arrays)


SHAPES = [(1, 64), (3, 64), (4, 128), (8, 64)]  # groups and head sizes; the others are slow ones
OTHERS = [pytest.param(1, 128, marks=pytest.mark.slow), pytest.param(3, 128, marks=pytest.mark.slow)]
OTHERS += [pytest.param(4, 64, marks=pytest.mark.slow), pytest.param(8, 128, marks=pytest.mark.slow)]


@pytest.mark.parametrize("groups, head_dim", SHAPES + OTHERS)
@pytest.mark.parametrize("mask", MASKS)
def test_pallas_is_the_reference(mask, groups, head_dim):
    arguments = inputs(mask, groups, head_dim)
    expected, expected_gradients = outcome(*arguments, Execution(attention="xla"))
    found, found_gradients = outcome(*arguments, Execution(attention="pallas"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", ["causal", "lengths", "packed", "shared"])
def test_blocks_of_queries_are_softmax_attention(mask):
    arrays, arguments, real = inputs(mask, 3, 64, T=150)
    expected, expected_gradients = outcome(arrays, arguments, real, Execution(), softmax_attention)
    found, found_gradients = outcome(arrays, arguments, real, Execution(attention="xla"))
    for one, other in zip([found, *found_gradients], [expected, *expected_gradients], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_backward_pass_uses_stored_results(dtype):
    """With remat=dots it does not compute the outputs of attention again."""
    (q, k, v), mask, _ = inputs("causal", 3, 64, dtype=dtype, T=150)
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)

    def loss(q, k, v):
        return attend(q, k, v, mask, None, Execution(attention="xla")).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(jax.checkpoint(loss, policy=policy))).lower(q, k, v).as_text()
    blocks = -(-150 // 64)
    assert text.count("stablehlo.maximum") == blocks  # of the forward pass


@pytest.mark.parametrize("mask", ALL_MASKS)
def test_half_precision_is_near_the_reference(mask):
    arguments = inputs(mask, 3, 64)
    halves = inputs(mask, 3, 64, dtype=jnp.bfloat16)
    expected, expected_gradients = outcome(*arguments, Execution(attention="xla"))
    found, found_gradients = outcome(*halves, Execution(attention="xla"))
    for one, other in zip([found, *found_gradients], [expected, *expected_gradients], strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("mask", MASKS)
def test_pallas_runs_on_shards(mask):
    mesh = sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))
    arguments = inputs(mask, 2, 64, batch=4)
    expected, expected_gradients = outcome(*arguments, Execution(attention="xla"))
    found, found_gradients = outcome(*arguments, Execution(mesh, "pallas"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", ALL_MASKS)
def test_cudnn_is_the_reference(mask, monkeypatch):
    """On a GPU in values and gradients; elsewhere both passes are lowered for one."""
    *arguments, real = inputs(mask, 3, 64, dtype=jnp.bfloat16)
    execution = Execution(attention="cudnn", platform="gpu")
    if ON_GPU:
        expected, expected_gradients = outcome(*arguments, real, Execution(attention="xla"))
        found, found_gradients = outcome(*arguments, real, execution)
        for one, other in zip([found, *found_gradients], [expected, *expected_gradients], strict=True):
            np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), atol=0.05)
        return
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(jax_cudnn, "is_cuda_compute_capability_equal", lambda capability: False)

    def gradients(*arrays):
        return jax.grad(lambda *arrays: mix(*arrays).astype(jnp.float32).sum(), tuple(range(len(arrays))))(*arrays)

    def mix(q, k, v, *cache):
        return attend(q, k, v, arguments[1], KVCache(*cache) if cache else None, execution)

    text = jax.jit(gradients).trace(*arguments[0]).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text or "__cudnn$fmhaSoftmaxBackward" in text


def test_the_switch_reaches_every_pass(smollm2):
    """The method's passes with the kernel are those with the reference, on the real LLM; each kernel is really run."""
    trainable = LLM2VecGenModel(smollm2.architecture, 4, 0, 576).init(jax.random.key(0), smollm2.frozen)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 1000, (2, 24)), jnp.int32)
    lengths = jnp.array([24, 9])

    def passes(attention):
        model = LLM2VecGenModel(smollm2.architecture, 4, 0, 576, execution=Execution(one_device_mesh(), attention))
        calls = {
            "encode": lambda t, frozen: model.encode(t, frozen, ids, lengths)[0],
            "compress": lambda t, frozen: model.compress(t, frozen, model.prefill(frozen, ids, lengths, 32), lengths)[
                0
            ],
            "mean_pool": lambda t, frozen: model.mean_pool(frozen, ids, lengths, causal=False),
        }
        arguments = trainable, smollm2.frozen
        traced = {name: jax.jit(call).trace(*arguments) for name, call in calls.items()}
        kernels = {name: str(trace.jaxpr).count("pallas_call") for name, trace in traced.items()}
        return {name: trace.lower().compile()(*arguments) for name, trace in traced.items()}, kernels

    expected, none = passes("xla")
    found, some = passes("pallas")
    assert not any(none.values()) and all(some.values())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4 * np.abs(value).max())


def test_auto_takes_what_is_fast():
    chosen = functools.partial(Execution.attention_kernel, head_dim=64, cached=False, dropout=False)
    half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert chosen(Execution(platform="cpu"), 512, dtype=half) == "xla"
    assert chosen(Execution(platform="gpu"), 512, dtype=half) == "cudnn"
    assert chosen(Execution(platform="gpu"), 512, dtype=single) == "xla"
    assert chosen(Execution(platform="tpu"), 512, dtype=single) == "pallas"
    assert chosen(Execution(platform="tpu"), 1, dtype=half, cached=True) == "xla"
    assert chosen(Execution(platform="tpu", attention="pallas"), 512, dtype=half, dropout=True) == "xla"


@pytest.mark.parametrize("attention, platform", [("cudnn", "cpu"), ("cudnn", "tpu"), ("pallas", "gpu")])
def test_a_kernel_that_the_devices_lack_is_refused(attention, platform):
    with pytest.raises(InputError, match=f"kernels.attention={attention}: is not for {platform} devices"):
        Execution(attention=attention, platform=platform)
