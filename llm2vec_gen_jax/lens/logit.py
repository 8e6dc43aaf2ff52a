"""The logit lens: which tokens of the vocabulary the LM head finds in a compression token (nostalgebraist 2020)."""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax.common.errors import InputError, nearest, not_finite, quote
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.config.lens import READINGS, LogitLensConfig
from llm2vec_gen_jax.inference.encode import check_texts, finite
from llm2vec_gen_jax.lens.states import compression_states
from llm2vec_gen_jax.model.execution import platform_jit
from llm2vec_gen_jax.parallel import sharding

_ROWS = 128  # states that are projected together: the logits of more would be large
_POOL = 64  # tokens of which the whole words are made
# English function words, which say little about a text.
STOP_WORDS = frozenset(
    """about above after again all also am an and any are as at be because been before being below between both but by
    can could did do does doing don down during each few for from further had has have having he her here hers him his
    how however if in into is it its itself just let ll may me might more most must my no nor not now of off on once
    only or other our ours out over own re same shall she should so some such than that the their theirs them then
    there these they this those through to too under until up ve very was we were what when where which while who
    whom whose why will with within without would you your yours""".split()
)


class Candidate(NamedTuple):
    """A token of the vocabulary, its leading space kept, or a whole word; with its probability."""

    text: str
    probability: float


def logit_lens(
    embedder,
    texts,
    top_k=5,
    state="hidden",
    words=False,
    stop_words=False,
    batch_size=16,
    max_length=None,
    show_progress_bar=False,
):
    """Returns, of each text, for each of the K compression tokens, the top_k Candidates, the most probable first.

    embedder: an LLM2VecGen. state: "hidden", the last hidden state that the heads read, as the published analysis
    takes it; "soft_prompts", after the reconstruction head: what the decoder reads.
    words: whole words in place of tokens, made of the 64 most probable: spellings that differ in case and leading
    space are one word, their probabilities added; pieces that begin no word are left out, and function words
    (STOP_WORDS) unless stop_words is True.
    Raises InputError for an unknown state or a top_k beyond the vocabulary.
    """
    options.check_arguments(LogitLensConfig, top_k=top_k, words=words, stop_words=stop_words, batch_size=batch_size)
    if state not in READINGS:
        raise InputError(f"state {state!r} is unknown{nearest(str(state), READINGS)}")
    texts = check_texts(texts)
    model, tokenizer = embedder.model, embedder.backbone.tokenizer
    pool = max(top_k, _POOL) if words else top_k
    if not 1 <= top_k <= model.architecture.vocab_size:
        raise InputError(f"top_k must be within 1 and {model.architecture.vocab_size}, found {top_k}")
    last = [model.architecture.num_layers]
    states = compression_states(embedder, texts, last, batch_size, max_length, show_progress_bar)[:, 0]
    probabilities, ids = _top(embedder, state, states, min(pool, model.architecture.vocab_size))
    for text in np.flatnonzero(~finite([probabilities])):  # soft prompts may exceed the backbone's dtype
        raise not_finite(f"text {text} (from 0), {quote(texts[text])}", embedder.backbone.dtype)
    found = [
        [_candidates(tokenizer, *token) for token in zip(*text)] for text in zip(ids.tolist(), probabilities.tolist())
    ]
    if words:
        return [[whole_words(token, _starts(tokenizer), stop_words)[:top_k] for token in text] for text in found]
    return found


def whole_words(candidates, starts, stop_words=False):
    """Returns Candidates merged by word, the most probable first; each is spelt as its most probable token.

    starts: lower-cased words with which the vocabulary begins a word.
    """
    spelling, total = {}, collections.Counter()
    for text, probability in candidates:
        word = text.strip(" \t\r\n.,:;!?\"'()[]{}*_`#-")
        key = word.lower()
        if not any(char.isalnum() for char in key) or (key in STOP_WORDS and not stop_words):
            continue
        if key.isascii() and key.isalpha() and not _is_word(text, word, starts, stop_words):
            continue
        spelling.setdefault(key, word)
        total[key] += probability
    return [Candidate(spelling[key], probability) for key, probability in total.most_common()]


def _is_word(text, word, starts, stop_words):
    """Whether an English token is likely to be a word: it can begin one, and is long, in capitals or known."""
    begins = text.startswith(" ") or word.lower() in starts
    known = stop_words and word.lower() in STOP_WORDS
    return begins and (len(word) > 2 or (len(word) == 2 and word.isupper()) or known)


def over_tokens(text):
    """Returns the Candidates of all compression tokens of a text as one list: mean probability over the tokens."""
    spelling, total = {}, collections.Counter()
    for word, probability in (candidate for token in text for candidate in token):
        total[spelling.setdefault(word.lower(), word)] += probability / len(text)
    return [Candidate(*pair) for pair in total.most_common()]


@functools.lru_cache(maxsize=4)
def _starts(tokenizer):
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
        found = _project(embedder.model, state, count, embedder.trainable, backbone.frozen, part_ND)
        end = min(start + _ROWS, B * K)
        probabilities[start:end], ids[start:end] = (np.asarray(x)[: end - start] for x in found)
    return probabilities.reshape(B, K, count), ids.reshape(B, K, count)


@functools.partial(platform_jit, static_argnums=(1, 2))
def _project(model, state, count, trainable, frozen, state_ND):
    if state == "soft_prompts":
        state_ND = model.heads(trainable, state_ND[:, None])[1][:, 0]
    logits_NV = model.logits(frozen, state_ND.astype(frozen["embedding"].dtype))
    top_NC, ids_NC = jax.lax.top_k(logits_NV, count)
    return jnp.exp(top_NC - jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)), ids_NC
