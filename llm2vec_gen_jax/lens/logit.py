"""Logit lens (nostalgebraist 2020): the most probable tokens when the LM head reads a compression token."""

import collections
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax.common.errors import InputError, nearest, not_finite, quote
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.config.lens import READINGS, LogitLensConfig
from llm2vec_gen_jax.inference.encode import check_texts, finite
from llm2vec_gen_jax.lens.states import Embedder, compression_states
from llm2vec_gen_jax.model.execution import platform_jit
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.tokenizer import Tokenizer

_ROWS = 128  # states per call of the LM head, which bounds the memory of the logits
_POOL = 64  # candidate tokens that are merged to words
# English function words
STOP_WORDS = frozenset(
    """about above after again all also am an and any are as at be because been before being below between both but by
    can could did do does doing don down during each few for from further had has have having he her here hers him his
    how however if in into is it its itself just let ll may me might more most must my no nor not now of off on once
    only or other our ours out over own re same shall she should so some such than that the their theirs them then
    there these they this those through to too under until up ve very was we were what when where which while who
    whom whose why will with within without would you your yours""".split()
)


class Candidate(NamedTuple):
    """A token, including its leading space, or a word; with its probability."""

    text: str
    probability: float


def logit_lens(
    embedder: Embedder,
    texts: str | Iterable[str],
    top_k: int = 5,
    state: str = "hidden",
    words: bool = False,
    stop_words: bool = False,
    batch_size: int = 16,
    max_length: int | None = None,
    show_progress_bar: bool = False,
) -> list[list[list[Candidate]]]:
    """Returns the top_k Candidates of each of the K compression tokens of each text, the most probable first.

    state: "hidden", the last hidden state (the input of the heads), as in the published analysis; "soft_prompts", the
    output of the reconstruction head (the input of the decoder).
    words: merge the 64 most probable tokens to words: the probabilities of spellings that differ in case or leading
    space are added; tokens that do not begin a word are dropped, and STOP_WORDS unless stop_words is True.
    Raises InputError for an unknown state or a top_k beyond the vocabulary.
    """
    options.check_arguments(LogitLensConfig, top_k=top_k, words=words, stop_words=stop_words, batch_size=batch_size)
    if state not in READINGS:
        raise InputError(f"state {state!r} is unknown{nearest(str(state), READINGS)}")
    texts = check_texts(texts)
    model, tokenizer = embedder.model, embedder.backbone.tokenizer
    pool = max(top_k, _POOL) if words else top_k
    if not 1 <= top_k <= model.architecture.vocab_size:
        raise InputError(f"top_k must be between 1 and {model.architecture.vocab_size}, found {top_k}")
    last = [model.architecture.num_layers]
    states = compression_states(embedder, texts, last, batch_size, max_length, show_progress_bar)[:, 0]
    probabilities, ids = _top(embedder, state, states, min(pool, model.architecture.vocab_size))
    for text in np.flatnonzero(~finite([probabilities])):  # soft prompts may exceed the backbone's dtype
        raise not_finite(f"text {text} (from 0), {quote(texts[text])}", embedder.backbone.dtype)
    candidates = [
        [_candidates(tokenizer, *token) for token in zip(*text)] for text in zip(ids.tolist(), probabilities.tolist())
    ]
    if words:
        starts = _starts(tokenizer)
        return [[whole_words(token, starts, stop_words)[:top_k] for token in text] for text in candidates]
    return candidates


def whole_words(
    candidates: Iterable[Candidate], starts: frozenset[str] | set[str], stop_words: bool = False
) -> list[Candidate]:
    """Returns Candidates merged by word, the most probable first, with the spelling of the most probable token.

    starts: lower-cased tokens of the vocabulary that begin a word.
    """
    spelling: dict[str, str] = {}
    total: collections.defaultdict[str, float] = collections.defaultdict(float)
    for text, probability in candidates:
        word = text.strip(" \t\r\n.,:;!?\"'()[]{}*_`#-")
        key = word.lower()
        if not any(char.isalnum() for char in key) or (key in STOP_WORDS and not stop_words):
            continue
        if key.isascii() and key.isalpha() and not _is_word(text, word, starts, stop_words):
            continue
        spelling.setdefault(key, word)
        total[key] += probability
    return [Candidate(spelling[key], probability) for key, probability in _descending(total)]


def _is_word(text, word, starts, stop_words):
    """Returns whether an English token is likely a word: it can begin one, and is long, upper-case or known."""
    begins = text.startswith(" ") or word.lower() in starts
    known = stop_words and word.lower() in STOP_WORDS
    return begins and (len(word) > 2 or (len(word) == 2 and word.isupper()) or known)


def over_tokens(text: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """Returns the Candidates of a text with their probabilities averaged over its compression tokens."""
    spelling: dict[str, str] = {}
    total: collections.defaultdict[str, float] = collections.defaultdict(float)
    for word, probability in (candidate for token in text for candidate in token):
        total[spelling.setdefault(word.lower(), word)] += probability / len(text)
    return [Candidate(*pair) for pair in _descending(total)]


def _descending(total: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(total.items(), key=lambda pair: pair[1], reverse=True)


@functools.lru_cache(maxsize=4)
def _starts(tokenizer: Tokenizer) -> frozenset[str]:
    return frozenset(piece[1:].lower() for piece in tokenizer.pieces if piece.startswith(" "))


def _candidates(tokenizer, ids, probabilities):
    pieces = tokenizer.pieces  # the embedding table may have more rows
    texts = [(pieces[id_] if id_ < len(pieces) else "") or f"<{id_}>" for id_ in ids]
    return [Candidate(*pair) for pair in zip(texts, probabilities)]


def _top(embedder, state, states_BKD, count):
    """Returns (probabilities, ids), (B, K, count) each, of hidden states."""
    (B, K, D), backbone = states_BKD.shape, embedder.backbone
    probabilities, ids = np.zeros((B * K, count), np.float32), np.zeros((B * K, count), np.int32)
    rows_ND = states_BKD.reshape(-1, D)
    for start in range(0, B * K, _ROWS):
        part_ND = rows_ND[start : start + _ROWS]
        part_ND = np.pad(part_ND, ((0, _ROWS - len(part_ND)), (0, 0)))
        part_ND = sharding.put_replicated(part_ND, backbone.mesh)
        top = _project(embedder.model, state, count, embedder.trainable, backbone.frozen, part_ND)
        end = min(start + _ROWS, B * K)
        probabilities[start:end], ids[start:end] = (np.asarray(x)[: end - start] for x in top)
    return probabilities.reshape(B, K, count), ids.reshape(B, K, count)


@functools.partial(platform_jit, static_argnums=(1, 2))
def _project(
    model: LLM2VecGenModel, state: str, count: int, trainable: Any, frozen: Any, state_ND: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if state == "soft_prompts":
        state_ND = model.heads(trainable, state_ND[:, None])[1][:, 0]
    logits_NV = model.logits(frozen, state_ND.astype(frozen["embedding"].dtype))
    top_NC, ids_NC = jax.lax.top_k(logits_NV, count)
    return jnp.exp(top_NC - jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)), ids_NC
