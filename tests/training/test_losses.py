"""The losses: exact against torch, blind to padding, and nothing computed that has weight 0."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from llm2vec_gen_jax import config
from llm2vec_gen_jax.data.buckets import pad
from llm2vec_gen_jax.model import compressor
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.training import losses
from tests.conftest import tiny_torch_model

K, V = 4, 264  # the tiny models' vocabulary; no other dimension has this size
ANSWERS = [[5, 9, 77, 2], [30, 2], [8, 8, 8, 120, 121, 2]]


def assert_close(found, expected, tolerance):
    """The tolerance is a share of the expected values' largest."""
    expected = np.asarray(expected, np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max() + 1e-30)


def torch_cross_entropy(hidden, head, labels, weights):
    """Returns (weighted sum of cross-entropies, its gradient with respect to hidden), by torch's autograd."""
    import torch

    hidden = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
    logits = hidden @ torch.tensor(head, dtype=torch.float64).T
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(labels, dtype=torch.long).flatten(), reduction="none"
    )
    loss = (each * torch.tensor(weights).flatten()).sum()
    loss.backward()
    return loss.item(), hidden.grad.numpy()


def random_tokens(B, S, size, scale=1.0):
    """Returns (hidden_BSD, head_VD, labels_BS) with D = 8 and V = size."""
    rng = np.random.default_rng([B, S, size])
    hidden_BSD = scale * rng.normal(size=(B, S, 8)).astype(np.float32)
    return hidden_BSD, rng.normal(size=(size, 8)).astype(np.float32), rng.integers(0, size, (B, S), np.int32)


@functools.partial(jax.jit, static_argnums=4)
def fused(hidden_BSD, head_VD, labels_BS, weights_BS, chunks):
    """Returns (value, (gradient with respect to hidden, to the head))."""
    gradient = jax.value_and_grad(losses.fused_cross_entropy, (0, 1))
    return gradient(hidden_BSD, head_VD, labels_BS, weights_BS, chunks)


# The fused cross-entropy


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(data=st.data(), size=st.sampled_from([2, 37]))
def test_fused_cross_entropy_equals_the_plain_one(data, size):
    """Value and gradient, also when the chunks do not divide the tokens or outnumber them."""
    B, S, chunks = (data.draw(st.integers(1, most)) for most in (3, 6, 8))
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=B * S, max_size=B * S))
    weights_BS = np.array(weights, np.float32).reshape(B, S)
    hidden_BSD, head_VD, labels_BS = random_tokens(B, S, size, data.draw(st.sampled_from([0.1, 1.0, 60.0])))
    value, (gradient_BSD, head_gradient_VD) = fused(hidden_BSD, head_VD, labels_BS, weights_BS, chunks)
    expected, expected_BSD = torch_cross_entropy(hidden_BSD, head_VD, labels_BS, weights_BS)
    # Float32 rounds the logits, and a loss near 0 is a small difference of them.
    rounding = 1e-6 * max(1, np.abs(hidden_BSD @ head_VD.T).max())
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=rounding * B * S)
    np.testing.assert_allclose(gradient_BSD, expected_BSD, rtol=1e-6, atol=rounding * np.abs(head_VD).max())
    assert not head_gradient_VD.any()  # the head is frozen


def test_fused_cross_entropy_is_linear_in_its_cotangent():
    hidden_BSD, head_VD, labels_BS = random_tokens(2, 5, 37)
    weights_BS = np.ones((2, 5), np.float32)
    _, (gradient_BSD, _) = fused(hidden_BSD, head_VD, labels_BS, weights_BS, 2)

    def scaled(hidden_BSD):
        return -3 * losses.fused_cross_entropy(hidden_BSD, head_VD, labels_BS, weights_BS, 2)

    assert_close(jax.grad(scaled)(hidden_BSD), -3 * gradient_BSD, 1e-6)


def test_fused_cross_entropy_in_bfloat16_is_close():
    """Against the exact numbers of the rounded inputs."""
    hidden_BSD, head_VD, labels_BS = random_tokens(2, 5, 37)
    weights_BS = np.ones((2, 5), np.float32)
    hidden_BSD, head_VD = hidden_BSD.astype(jnp.bfloat16), head_VD.astype(jnp.bfloat16)
    value, (gradient_BSD, _) = fused(hidden_BSD, head_VD, labels_BS, weights_BS, 2)
    rounded = hidden_BSD.astype(np.float32), head_VD.astype(np.float32)
    expected, expected_BSD = torch_cross_entropy(*rounded, labels_BS, weights_BS)
    assert value.dtype == jnp.float32 and gradient_BSD.dtype == jnp.bfloat16
    assert_close(value, expected, 1e-5)
    assert_close(gradient_BSD.astype(np.float32), expected_BSD, 0.01)


def shapes_in(jaxpr):
    """Yields the shape of every array that a jaxpr computes, the inner jaxprs' too."""
    for equation in jaxpr.eqns:
        yield from (getattr(variable.aval, "shape", ()) for variable in equation.outvars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


@pytest.mark.parametrize("chunks, whole", [(1, True), (4, False)])
def test_all_logits_never_exist_at_once(chunks, whole):
    arguments = (*random_tokens(2, 12, 37), np.ones((2, 12), np.float32))
    found = max(np.prod(shape) for shape in shapes_in(jax.make_jaxpr(fused, 4)(*arguments, chunks).jaxpr))
    assert found == 2 * 12 * 37 if whole else found < 2 * 12 * 37 / 2


# Reconstruction


@pytest.fixture(scope="module")
def parts(tiny):
    """Returns (Model, frozen tree, soft prompts (3, K, D)) on the tiny untied Llama."""
    model = LLM2VecGenModel(tiny("llama").architecture, K, 0, 20)
    soft_prompts_BKD = np.random.default_rng(0).normal(size=(3, K, 32)).astype(np.float32)
    return model, tiny("llama").frozen, soft_prompts_BKD


@functools.partial(jax.jit, static_argnums=(0, 5))
def reconstruction(model, frozen, soft_prompts_BKD, answer_BS, lengths_B, chunk_tokens=5):
    """Returns (loss, its gradient with respect to the soft prompts)."""
    loss = functools.partial(losses.reconstruction, model, frozen)
    return jax.value_and_grad(loss)(soft_prompts_BKD, answer_BS, lengths_B, chunk_tokens)


def padded(answers, length=8, padding=0):
    lengths_B = np.array([len(answer) for answer in answers], np.int32)
    return np.where(np.arange(length) < lengths_B[:, None], pad(answers, length), padding), lengths_B


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_reconstruction_equals_torch(chunk_tokens, parts):
    """Against the loss that transformers computes itself from [soft prompts, answer] and shifted labels."""
    import torch

    model, frozen, soft_prompts_BKD = parts
    loss, gradient_BKD = reconstruction(*parts, *padded(ANSWERS), chunk_tokens)
    torch_model = tiny_torch_model("llama")
    answer_BS, lengths_B = padded(ANSWERS)
    ignored = np.where(np.arange(8) < lengths_B[:, None], answer_BS, -100)
    labels = torch.tensor(np.concatenate([np.full((3, K), -100), ignored], axis=1))
    soft_prompts = torch.tensor(soft_prompts_BKD, requires_grad=True)
    inputs = torch.cat([soft_prompts, torch_model.model.embed_tokens(torch.tensor(answer_BS))], dim=1)
    expected = torch_model(inputs_embeds=inputs, labels=labels).loss
    expected.backward()
    assert_close(loss, expected.item(), 1e-5)
    assert_close(gradient_BKD, soft_prompts.grad.numpy(), 1e-4)


def test_reconstruction_ignores_padding(parts):
    loss, gradient_BKD = reconstruction(*parts, *padded(ANSWERS))
    for length, padding in ((8, 123), (11, 0)):
        other, other_BKD = reconstruction(*parts, *padded(ANSWERS, length, padding))
        assert_close(other, loss, 1e-6)
        assert_close(other_BKD, gradient_BKD, 1e-5)


def test_last_soft_prompt_predicts_the_first_answer_token(parts):
    """The LLM runs on soft prompts alone: an answer of one token needs nothing else."""
    import torch

    soft_prompts_BKD = parts[-1]
    with torch.no_grad():
        logits_BV = tiny_torch_model("llama")(inputs_embeds=torch.tensor(soft_prompts_BKD)).logits[:, -1]
    first_B = [answer[0] for answer in ANSWERS]
    expected = torch.nn.functional.cross_entropy(logits_BV, torch.tensor(first_B)).item()
    loss, _ = reconstruction(*parts, *padded([[first] for first in first_B]))
    assert_close(loss, expected, 1e-5)


def test_predictions_see_only_earlier_answer_tokens(parts):
    model, frozen, soft_prompts_BKD = parts
    predict = jax.jit(model.predict_answer)
    answer_BS, lengths_B = padded([[5, 9, 77, 31, 64, 2]] * 3)
    expected = np.asarray(predict(frozen, soft_prompts_BKD, answer_BS, lengths_B))
    assert expected.shape == (3, 8, 32)
    changed_BS = answer_BS.copy()
    changed_BS[:, 3] = 200
    found = np.asarray(predict(frozen, soft_prompts_BKD, changed_BS, lengths_B))
    differs_S = np.abs(found - expected).max(axis=(0, 2)) > 1e-4
    assert differs_S.tolist() == [False] * 4 + [True] * 4


def test_empty_answers_weigh_nothing(parts):
    loss, gradient_BKD = reconstruction(*parts, *padded([[], [], []]))
    assert loss == 0
    assert not gradient_BKD.any()  # zeros, not NaN
    expected, expected_BKD = reconstruction(*parts, *padded([ANSWERS[0]] * 3))
    loss, gradient_BKD = reconstruction(*parts, *padded([ANSWERS[0], [], []]))
    model, frozen, soft_prompts_BKD = parts
    alone, _ = reconstruction(model, frozen, soft_prompts_BKD[:1], *padded(ANSWERS[:1]))
    assert_close(loss, alone, 1e-6)
    assert not gradient_BKD[1:].any()
    assert_close(gradient_BKD[0], 3 * expected_BKD[0], 1e-5)


# Alignment, and the sum


def test_alignment_equals_torch():
    import torch

    embedding_BE, target_BE = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    embedding = torch.tensor(embedding_BE, requires_grad=True)
    expected = torch.nn.MSELoss()(embedding, torch.tensor(target_BE))
    expected.backward()
    value, gradient_BE = jax.value_and_grad(losses.alignment)(embedding_BE, target_BE)
    assert_close(value, expected.item(), 1e-6)
    assert_close(gradient_BE, embedding.grad.numpy(), 1e-6)


def test_cosine_alignment_equals_torch():
    import torch

    embedding_BE, target_BE = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    embedding = torch.tensor(embedding_BE, requires_grad=True)
    expected = 1 - torch.nn.functional.cosine_similarity(embedding, torch.tensor(target_BE)).mean()
    expected.backward()
    value, gradient_BE = jax.value_and_grad(losses.cosine_alignment)(embedding_BE, target_BE)
    assert_close(value, expected.item(), 1e-6)
    assert_close(gradient_BE, embedding.grad.numpy(), 1e-6)
    value, gradient_BE = jax.value_and_grad(losses.cosine_alignment)(embedding_BE * 0, target_BE)
    assert value == 1 and np.isfinite(gradient_BE).all()


def test_alignment_function_is_that_of_every_alignment_loss(training):
    """All targets are the embedding itself, three times as long: no loss by cosine, some by mean squared error."""
    _, (trainable, frozen, batch) = training(1.0, 1.0)

    def compute(function, batch):
        weights = config.LossConfig(reconstruction=0.0, repeat=1.0, alignment_function=function)
        return losses.loss_fn(trainable, training.model, frozen, batch, weights)[1]

    embedding_BE, _ = training.model.compress(trainable, frozen, batch["query"], batch["query_lengths"])
    more = {"extra_lengths": batch["query_lengths"][:, None], "extra": batch["query"], "target": 3 * embedding_BE}
    for function, least, most in (("cosine", -1e-5, 1e-5), ("mse", 1e-2, np.inf)):
        parts = compute(function, batch | more)
        for name in ("alignment_loss", "repeat_alignment_loss"):
            assert least < parts[name] < most


@pytest.fixture(scope="module")
def training(tiny):
    """Returns f(reconstruction, alignment): the jitted loss with its gradients, and a batch to call it on."""
    backbone = tiny("qwen3")
    model = LLM2VecGenModel(backbone.architecture, K, 0, 20)
    trainable = compressor.init_trainable(model.compressor, jax.random.key(0), backbone.frozen["embedding"])
    answer_BS, answer_lengths_B = padded(ANSWERS)
    batch = {
        "query_lengths": np.array([4, 7, 0], np.int32),
        "answer": answer_BS,
        "answer_lengths": answer_lengths_B,
        "target": np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32),
    }
    cache = jax.jit(model.prefill, static_argnums=3)(backbone.frozen, np.full((3, 8), 9), batch["query_lengths"], 8)

    @functools.cache
    def make(reconstruction, alignment):
        weights = config.LossConfig(reconstruction=reconstruction, alignment=alignment)

        @jax.jit
        def gradient(trainable, frozen, batch):
            total = jax.value_and_grad(losses.loss_fn, has_aux=True)
            return total(trainable, model, frozen, batch, weights)

        return gradient, (trainable, backbone.frozen, batch | {"query": cache})

    make.model = model
    return make


def run(training, reconstruction, alignment):
    """Returns (loss, parts, gradients)."""
    gradient, arguments = training(reconstruction, alignment)
    (loss, parts), gradients = gradient(*arguments)
    return loss, parts, gradients


def test_total_is_the_weighted_sum(training):
    loss, parts, gradients = run(training, 0.5, 2.0)
    assert_close(loss, 0.5 * parts["reconstruction_loss"] + 2 * parts["alignment_loss"], 1e-6)
    _, by_reconstruction, reconstruction_gradients = run(training, 0.5, 0.0)
    _, by_alignment, alignment_gradients = run(training, 0.0, 2.0)
    assert_close(by_reconstruction["reconstruction_loss"], parts["reconstruction_loss"], 1e-6)
    assert_close(by_alignment["alignment_loss"], parts["alignment_loss"], 1e-6)
    added = jax.tree.map(jnp.add, reconstruction_gradients, alignment_gradients)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), gradients, added)


def test_loss_of_weight_zero_gives_no_loss_and_no_gradient(training):
    loss, parts, gradients = run(training, 0.0, 2.0)
    assert parts["reconstruction_loss"] == 0
    assert loss == 2 * parts["alignment_loss"] > 0
    assert all(leaf.any() for leaf in jax.tree.leaves(gradients))
    loss, parts, gradients = run(training, 0.5, 0.0)
    assert parts["alignment_loss"] == 0
    assert loss == 0.5 * parts["reconstruction_loss"] > 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients["alignment"]))


def test_loss_of_weight_zero_is_not_computed(training):
    """Without the reconstruction nothing has the vocabulary's size; without the alignment there is less."""

    def shapes(*weights):
        gradient, arguments = training(*weights)
        return list(shapes_in(jax.make_jaxpr(gradient)(*arguments).jaxpr))

    both = shapes(0.5, 2.0)
    assert any(V in shape for shape in both)
    assert not any(V in shape for shape in shapes(0.0, 2.0))
    assert len(shapes(0.5, 0.0)) < len(both)
