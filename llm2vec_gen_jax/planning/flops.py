"""FLOPs of the method, and bytes read by decoding, as functions of lengths in tokens."""

from collections.abc import Sequence

import numpy as np

from llm2vec_gen_jax.model.architecture import Architecture


def forward_flops(architecture: Architecture, lengths: Sequence[int] | np.ndarray) -> float:
    """Returns the FLOPs of one causal forward pass over texts of these lengths, without the output matrix.

    2 per weight and token, and half of 4 per pair of tokens, head and head dimension for causal attention.
    """
    a, T = architecture, np.asarray(lengths, np.float64)
    return float(np.sum(2 * layer_weights(a) * T + _flops_per_pair(a) * T * T / 2))


def training_flops(
    architecture: Architecture,
    queries: Sequence[int] | np.ndarray,
    answers: Sequence[int] | np.ndarray,
    num_tokens: int,
    num_thought_tokens: int = 0,
    lora: bool = False,
) -> float:
    """Returns the FLOPs of one training step on queries and answers of these lengths, without recomputation.

    A backward pass adds 2 per weight and token (frozen weights have no gradient) and triples those of attention. The
    queries have a backward pass only with LoRA; appended tokens and answers always do. The output matrix is applied
    twice to answer tokens.
    """
    a, T, S = architecture, np.asarray(queries, np.float64), np.asarray(answers, np.float64)
    K, M = num_tokens, num_tokens + num_thought_tokens
    weights, pair = layer_weights(a), _flops_per_pair(a)
    compressing = 4 * weights * M + 3 * pair * M * (T + M / 2)
    answering = 4 * weights * (K + S) + 3 * pair * (K + S) ** 2 / 2 + 4 * a.vocab_size * a.hidden_size * S
    return (2 if lora else 1) * forward_flops(a, T) + float(np.sum(compressing + answering))


def decoding_bytes(
    architecture: Architecture, prompts: Sequence[int] | np.ndarray, new_tokens: int, itemsize: int
) -> float:
    """Returns the least number of bytes that decoding a batch reads: in each step, all weights and the KV cache.

    prompts: lengths of the prompts; new_tokens: per prompt; itemsize: bytes per number.
    """
    a, T, N = architecture, np.asarray(prompts, np.float64), new_tokens
    tables = 0 if a.tied_embeddings else a.vocab_size * a.hidden_size  # only the rows of the tokens are read
    cached = float(np.sum(N * T + N * (N - 1) / 2)) * 2 * a.num_layers * a.num_kv_heads * a.head_dim
    return itemsize * (N * (a.num_parameters - tables) + cached)


def layer_weights(architecture: Architecture) -> int:
    """Returns the number of parameters without the embedding tables."""
    a = architecture
    return a.num_parameters - (1 if a.tied_embeddings else 2) * a.vocab_size * a.hidden_size


def _flops_per_pair(architecture: Architecture) -> int:
    return 4 * architecture.num_layers * architecture.num_heads * architecture.head_dim
