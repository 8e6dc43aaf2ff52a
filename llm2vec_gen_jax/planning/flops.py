"""The one count of FLOPs of the method, by lengths in tokens, and what devices can do by their data sheets."""

import numpy as np


def reading_flops(architecture, lengths):
    """Returns the FLOPs of one causal forward pass over texts of these lengths, without the output matrix.

    2 for each weight and token; attention: 4 for each pair of tokens, head and head dimension, half of it causal.
    """
    a, T = architecture, np.asarray(lengths, np.float64)
    return float(np.sum(2 * layer_weights(a) * T + _pair(a) * T * T / 2))


def training_flops(architecture, queries, answers, num_tokens, num_thought_tokens=0, lora=False):
    """Returns the FLOPs of training on queries and answers of these lengths, recomputation not counted.

    As `reading_flops`, and 2 more backward (the frozen weights get no gradient): queries forward (with a LoRA both),
    appended tokens and answers both. Attention three times that with its backward pass. The output matrix twice for
    answer tokens.
    """
    a, T, S = architecture, np.asarray(queries, np.float64), np.asarray(answers, np.float64)
    K, M = num_tokens, num_tokens + num_thought_tokens
    weights, pair = layer_weights(a), _pair(a)
    compressing = 4 * weights * M + 3 * pair * M * (T + M / 2)
    answering = 4 * weights * (K + S) + 3 * pair * (K + S) ** 2 / 2 + 4 * a.vocab_size * a.hidden_size * S
    return (2 if lora else 1) * reading_flops(a, T) + float(np.sum(compressing + answering))


def decoding_bytes(architecture, prompts, new_tokens, itemsize):
    """Returns the bytes that decoding reads at least: all weights in every step, and the keys and values so far.

    prompts: lengths of one batch, decoded together; new_tokens of each. itemsize: bytes of a number.
    """
    a, T, N = architecture, np.asarray(prompts, np.float64), new_tokens
    tables = 0 if a.tied_embeddings else a.vocab_size * a.hidden_size  # of the input table, only the tokens' rows
    cached = float(np.sum(N * T + N * (N - 1) / 2)) * 2 * a.num_layers * a.num_kv_heads * a.head_dim
    return itemsize * (N * (a.num_parameters - tables) + cached)


def layer_weights(architecture):
    """Number of weights that every token is multiplied with: all but the tables."""
    a = architecture
    return a.num_parameters - (1 if a.tied_embeddings else 2) * a.vocab_size * a.hidden_size


def _pair(architecture):
    return 4 * architecture.num_layers * architecture.num_heads * architecture.head_dim
