"""Measurements of decoded text: overlap, perplexity and refusals."""

import math

import pytest

from llm2vec_gen_jax.experiments import text_metrics
from llm2vec_gen_jax.teachers import encoder
from tests.conftest import tiny_torch_model, torch_outputs


def test_overlap_metrics():
    text, reference = "The cat sat, on the mat!", "the mat on the cat"
    assert text_metrics.token_f1(text, reference) == pytest.approx(2 * 5 / (6 + 5))
    assert text_metrics.rouge_l(text, reference) == pytest.approx(
        2 * 3 / (6 + 5)
    )  # "on the" or "the ... the mat": the, on, the
    assert text_metrics.token_f1("", "a") == text_metrics.rouge_l("a", "") == text_metrics.rouge_l("a", "b") == 0
    assert text_metrics.distinct_bigrams("a b a b a") == 0.5 and text_metrics.distinct_bigrams("a") is None


def test_perplexity_matches_torch(tiny):
    import torch

    backbone, model = tiny("qwen2"), tiny_torch_model("qwen2")
    texts = ["A cat.", "x", "", "a longer text than others, with words"]
    sums, counts = text_metrics.nll(backbone, texts, 30)
    ids = backbone.tokenizer.encode(texts, 30)
    for row, (_, logits) in enumerate(torch_outputs(model, [ids[0], ids[3]])):
        text = (0, 3)[row]
        log = torch.log_softmax(torch.tensor(logits), dim=-1).numpy()
        expected = -sum(log[place, token] for place, token in enumerate(ids[text][1:]))
        assert sums[text] == pytest.approx(expected, rel=1e-4) and counts[text] == len(ids[text]) - 1
    assert sums[1] == sums[2] == counts[1] == counts[2] == 0
    teacher = encoder.Teacher(backbone, backbone.frozen, True)
    result = text_metrics.measure(texts, texts, backbone, teacher, 30)
    assert result["perplexity"] == pytest.approx(math.exp(sums.sum() / counts.sum()))
    assert result["empty"] == 1 and result["texts"] == 4


@pytest.mark.parametrize(
    "text, expected",
    [
        ("I’m sorry, but I can’t help with that.", True),
        ("i CANNOT do this", True),
        ("As an AI, I have no opinion.", True),
        ("As an example, take two eggs.", False),
        ("Sorry is a short word.", False),
        ("", False),
    ],
)
def test_refusals(text, expected):
    assert text_metrics.is_refusal(text) == expected
