"""The one count of FLOPs of the method, by lengths in tokens, and what devices can do by their data sheets."""

import dataclasses

import numpy as np

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device by its data sheet. flops: dense bfloat16, per second. memory: bytes. bandwidth: bytes per second of its
    memory. link: bytes per second that it can send to others of its slice or node, one way."""

    flops: float
    memory: float
    bandwidth: float
    link: float


# cloud.google.com/tpu/docs (v5e, v5p, v6e: "bidirectional" figures halved); nvidia.com data sheets of H100 and H200 SXM
# (dense, that is half of the sparse figure; NVLink 900 GB/s both ways together).
CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9),
}


def chip_of(kind):
    """Returns the Chip of a device's own name for its kind, or None where its data sheet is not known."""
    kind = kind.lower().replace(" lite", "e")
    return next((chip for name, chip in CHIPS.items() if name in kind), None)


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
