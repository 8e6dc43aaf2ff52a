"""Latent lens: exact nearest neighbors of compression tokens among the contexts of an index."""

import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import read_array, read_json, sha256_file
from llm2vec_gen_jax.common.terminal import command_prefix
from llm2vec_gen_jax.config import QueryIndexConfig, options
from llm2vec_gen_jax.inference import postprocess
from llm2vec_gen_jax.inference.encode import check_texts
from llm2vec_gen_jax.lens.index import RECORD, layer_file
from llm2vec_gen_jax.lens.states import Embedder, check_layers, compression_states
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone
from llm2vec_gen_jax.pretrained.tokenizer import Tokenizer

_CHUNK = 16384  # contexts per chunk on the device
_QUERIES = 1024  # states compared with a chunk at a time
_LETTER = re.compile(r"[\w'’-]")
_ENDED = re.compile(r"[.!?]$")  # a word that ends its sentence
_AROUND = 80  # characters of the sentence shown before and after a word


class Neighbor(NamedTuple):
    """A context near a state: its word, the cosine, its layer, and its sentence before and after the word."""

    word: str
    cosine: float
    layer: int
    before: str
    after: str


class Index:
    """A folder written by build_index, with memory-mapped vectors.

    layers: the indexed layers. count: contexts per layer. contexts: (count, 2), text and position.
    Raises InputError for any other folder, and for an index of another backbone.
    """

    def __init__(self, folder: str | os.PathLike[str], backbone: LoadedBackbone) -> None:
        self.folder, self.backbone = pathlib.Path(folder).expanduser(), backbone
        if not (self.folder / RECORD).is_file():
            raise InputError(f"index={folder}: no {RECORD} in it. Build it with `{command_prefix()}lens build_index`")
        record = read_json(self.folder / RECORD)
        if not {"backbone", "tokenizer", "sha256", "config", "count"} <= record.keys():
            raise InputError(f"index={folder}: its {RECORD} is not of `{command_prefix()}lens build_index`")
        ours = {"backbone": backbone.identity, "tokenizer": backbone.tokenizer.identity}
        if wrong := [key for key in ours if record[key] != ours[key]]:
            raise InputError(f"index={folder}: built for another {wrong[0]} than {backbone.name}. Build it again")
        self._sha256 = record["sha256"]
        self.layers, self.count = record["config"]["layers"], record["count"]
        self.contexts, self._offsets, self._ids = (self._map(name) for name in ("contexts", "offsets", "ids"))

    def vectors(self, layer: int) -> np.ndarray:
        """Returns the unit vectors (count, D) of a layer, memory-mapped."""
        return self._map(layer_file(layer).removesuffix(".npy"))

    def search(
        self, states_QD: np.ndarray, top_k: int = 5, layers: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (cosines, layers, rows), (Q, top_k) each: the nearest contexts over all `layers`, nearest first.

        layers: default all. Exact search; ties are ordered by layer and row.
        """
        results = [
            self._search_layer(postprocess.l2_normalize(states_QD), top_k, layer) for layer in layers or self.layers
        ]
        cosines, rows = (np.concatenate(parts, axis=1) for parts in zip(*results))
        of_layer = np.repeat(layers or self.layers, [part[0].shape[1] for part in results])
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :top_k]
        cosines, rows = (np.take_along_axis(x, order, axis=1) for x in (cosines, rows))
        return cosines, of_layer[order], rows

    def neighbor(self, cosine: float, layer: int, row: int) -> Neighbor:
        """Returns the Neighbor of a result of `search`."""
        text, position = self.contexts[row]
        ids = self._ids[self._offsets[text] : self._offsets[text + 1]].tolist()
        before, word, after = in_sentence(self.backbone.tokenizer, ids, int(position))
        return Neighbor(word, float(cosine), int(layer), before, after)

    def _map(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        if (expected := self._sha256.pop(path.name, None)) and (not path.is_file() or sha256_file(path) != expected):
            raise InputError(f"index={self.folder}: {path.name} was modified after it was built. Build the index again")
        return read_array(path, "index")

    def _search_layer(self, states_QD, top_k, layer):
        contexts_CD, top_k = self.vectors(layer), min(top_k, self.count)
        blocks = [jnp.asarray(states_QD[start : start + _QUERIES]) for start in range(0, len(states_QD), _QUERIES)]
        shapes = [(len(block), top_k) for block in blocks]
        best = [(jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)) for shape in shapes]
        size = min(self.count, _CHUNK)
        for start in range(0, self.count, size):
            chunk = np.asarray(contexts_CD[start : start + size])
            count = len(chunk)
            chunk = jnp.asarray(np.pad(chunk, ((0, size - count), (0, 0))))
            best = [_merge_chunk(pair, block, chunk, start, count) for pair, block in zip(best, blocks)]
        return tuple(np.concatenate([np.asarray(part[side]) for part in best]) for side in (0, 1))


@jax.jit
def _merge_chunk(best, states_QD, chunk_CD, start, count):
    """Merges the best (cosines, rows), (Q, k) each, with the `count` contexts of a chunk whose first row is `start`."""
    cosines_QC = jnp.einsum("qd,cd->qc", states_QD, chunk_CD.astype(jnp.float32), precision="highest")
    cosines_QC = jnp.where(jnp.arange(cosines_QC.shape[1]) < count, cosines_QC, -jnp.inf)
    top_Qk, index_Qk = jax.lax.top_k(cosines_QC, min(best[0].shape[1], cosines_QC.shape[1]))
    cosines, rows = jnp.concatenate([best[0], top_Qk], axis=1), jnp.concatenate([best[1], start + index_Qk], axis=1)
    top_Qk, index_Qk = jax.lax.top_k(cosines, best[0].shape[1])
    return top_Qk, jnp.take_along_axis(rows, index_Qk, axis=1)


def latent_lens(
    embedder: Embedder,
    index: Index,
    texts: str | Iterable[str],
    top_k: int = 5,
    layers: Sequence[int | str] | None = None,
    same_layer: bool = False,
    batch_size: int = 16,
    max_length: int | None = None,
    show_progress_bar: bool = False,
) -> list[dict[int, list[list[Neighbor]]]]:
    """Returns, for each text, {layer: top_k Neighbors of each of the K compression tokens, nearest first}.

    index: an Index of the embedder's backbone. layers: of the compression tokens, default those of the index.
    same_layer: search contexts of the same layer only, default those of all layers, as in LatentLens.
    Raises InputError for an invalid layer.
    """
    options.check_arguments(QueryIndexConfig, top_k=top_k, same_layer=same_layer, batch_size=batch_size)
    texts = check_texts(texts)
    layers = check_layers(layers or index.layers, embedder.model.architecture.num_layers)
    if same_layer and (missing := [layer for layer in layers if layer not in index.layers]):
        raise InputError(f"layers: {missing[0]} is not in the index, which has {', '.join(map(str, index.layers))}")
    if not texts:
        return []
    states = compression_states(embedder, texts, layers, batch_size, max_length, show_progress_bar)
    n, _, K, D = states.shape
    by_text: list[dict[int, list[list[Neighbor]]]] = [{} for _ in range(n)]
    for number, layer in enumerate(layers):
        results = index.search(states[:, number].reshape(-1, D), top_k, [layer] if same_layer else None)
        neighbors = [[index.neighbor(*one) for one in zip(*token)] for token in zip(*results)]
        for text in range(n):
            by_text[text][layer] = neighbors[text * K : (text + 1) * K]
    return by_text


def in_sentence(tokenizer: Tokenizer, ids: Sequence[int], position: int) -> tuple[str, str, str]:
    """Returns (before, word, after): the complete word of a token and its sentence, truncated on both sides."""
    before, through, text = (tokenizer.decode(part) for part in (ids[:position], ids[: position + 1], ids))
    start, end = len(before), len(through)
    start += len(text[start:end]) - len(text[start:end].lstrip())
    if start < end and _LETTER.match(text[start]):
        start -= len(_matched(rf"{_LETTER.pattern}*$", text[:start]))
    if start < end and _LETTER.match(text[end - 1]):
        end += len(_matched(rf"\A{_LETTER.pattern}*", text[end:]))
    left = re.split(r"[.!?] |\n", text[:start])[-1]
    right = _matched(r"\A.*?(?:[.!?](?= |$)|$)", "" if _ENDED.search(text[start:end]) else text[end:], re.MULTILINE)
    left = f"… {left[-_AROUND:].partition(' ')[2]}" if len(left) > _AROUND else left
    right = f"{right[:_AROUND].rpartition(' ')[0]} …" if len(right) > _AROUND else right
    return left, text[start:end], right


def _matched(pattern: str, text: str, flags: int = 0) -> str:
    match = re.search(pattern, text, flags)
    return match[0] if match else ""
