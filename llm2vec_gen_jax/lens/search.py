"""Reading with the latent lens: exact nearest neighbours of compression tokens among the contexts of an index."""

import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import read_array, read_json, sha256_file
from llm2vec_gen_jax.config import QueryIndexConfig, options
from llm2vec_gen_jax.inference import postprocess
from llm2vec_gen_jax.inference.encode import check_texts
from llm2vec_gen_jax.lens.index import RECORD, layer_file
from llm2vec_gen_jax.lens.states import check_layers, compression_states

_CHUNK = 16384  # contexts that are on the device together
_QUERIES = 1024  # states that are compared with them together
_LETTER = re.compile(r"[\w'’-]")
_ENDED = re.compile(r"[.!?]$")  # a word that ends its sentence
_AROUND = 80  # characters of a sentence that are shown before a word, and after it


class Neighbour(NamedTuple):
    """A context near a state: its word, the cosine, its layer, and what of its sentence is before and after it."""

    word: str
    cosine: float
    layer: int
    before: str
    after: str


class Index:
    """A folder that build_index wrote; its vectors are mapped, not read.

    layers: those that it has. count: contexts in each. contexts: (count, 2), text and position.
    Raises InputError where it is not such a folder, or not of this LoadedBackbone.
    """

    def __init__(self, folder, backbone):
        self.folder, self.backbone = pathlib.Path(folder).expanduser(), backbone
        if not (self.folder / RECORD).is_file():
            raise InputError(f"index={folder}: no {RECORD} in it. Make one with `python -m launch.lens build_index`")
        record = read_json(self.folder / RECORD)
        ours = {"backbone": backbone.identity, "tokenizer": backbone.tokenizer.identity}
        if wrong := [key for key in ours if record[key] != ours[key]]:
            raise InputError(f"index={folder}: is of another {wrong[0]} than {backbone.name}. Build one for this model")
        self._sha256 = record["sha256"]
        self.layers, self.count = record["config"]["layers"], record["count"]
        self.contexts, self._offsets, self._ids = (self._map(name) for name in ("contexts", "offsets", "ids"))

    def vectors(self, layer):
        """Returns the unit vectors (count, D) of a layer, mapped."""
        return self._map(layer_file(layer).removesuffix(".npy"))

    def search(self, states_QD, top_k=5, layers=None):
        """Returns (cosines, layers, rows), (Q, top_k) each: the nearest contexts of `layers` together, nearest first.

        layers: default all. Exact: every cosine is computed. Of equal ones the lower layer and row comes first.
        """
        found = [
            self._search_layer(postprocess.l2_normalize(states_QD), top_k, layer) for layer in layers or self.layers
        ]
        cosines, rows = (np.concatenate(parts, axis=1) for parts in zip(*found))
        of_layer = np.repeat(layers or self.layers, [part[0].shape[1] for part in found])
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :top_k]
        cosines, rows = (np.take_along_axis(x, order, axis=1) for x in (cosines, rows))
        return cosines, of_layer[order], rows

    def neighbour(self, cosine, layer, row):
        """Returns the Neighbour that a result of `search` is."""
        text, position = self.contexts[row]
        ids = self._ids[self._offsets[text] : self._offsets[text + 1]].tolist()
        before, word, after = in_sentence(self.backbone.tokenizer, ids, int(position))
        return Neighbour(word, float(cosine), int(layer), before, after)

    def _map(self, name):
        path = self.folder / f"{name}.npy"
        if (expected := self._sha256.pop(path.name, None)) and (not path.is_file() or sha256_file(path) != expected):
            raise InputError(f"index={self.folder}: {path.name} is not what build_index wrote. Build the index again")
        return read_array(path, "index")

    def _search_layer(self, states_QD, top_k, layer):
        contexts_CD, top_k = self.vectors(layer), min(top_k, self.count)
        blocks = [jnp.asarray(states_QD[start : start + _QUERIES]) for start in range(0, len(states_QD), _QUERIES)]
        shapes = [(len(block), top_k) for block in blocks]
        best = [(jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)) for shape in shapes]
        size = min(max(self.count, top_k), _CHUNK)
        for start in range(0, self.count, size):
            chunk = np.asarray(contexts_CD[start : start + size])
            real = len(chunk)
            chunk = jnp.asarray(np.pad(chunk, ((0, size - real), (0, 0))))
            best = [_nearer(kept, block, chunk, start, real) for kept, block in zip(best, blocks)]
        return tuple(np.concatenate([np.asarray(part[side]) for part in best]) for side in (0, 1))


@jax.jit
def _nearer(best, states_QD, chunk_CD, start, real):
    """Merges the best (cosines, rows), (Q, k) each, with the `real` contexts of a chunk that begins at row `start`."""
    cosines_QC = jnp.einsum("qd,cd->qc", states_QD, chunk_CD.astype(jnp.float32), precision="highest")
    cosines_QC = jnp.where(jnp.arange(cosines_QC.shape[1]) < real, cosines_QC, -jnp.inf)
    top_Qk, at_Qk = jax.lax.top_k(cosines_QC, min(best[0].shape[1], cosines_QC.shape[1]))
    cosines, rows = jnp.concatenate([best[0], top_Qk], axis=1), jnp.concatenate([best[1], start + at_Qk], axis=1)
    top_Qk, at_Qk = jax.lax.top_k(cosines, best[0].shape[1])
    return top_Qk, jnp.take_along_axis(rows, at_Qk, axis=1)


def latent_lens(
    embedder,
    index,
    texts,
    top_k=5,
    layers=None,
    same_layer=False,
    batch_size=16,
    max_length=None,
    show_progress_bar=False,
):
    """Returns, of each text, {layer: for each of the K compression tokens the top_k Neighbours, nearest first}.

    embedder: an LLM2VecGen. index: an Index of its backbone. layers: of the compression tokens, default the index's.
    same_layer: compare with contexts of the same layer only; otherwise with those of all layers, as LatentLens does.
    Raises InputError for a layer that there is not.
    """
    options.check_arguments(QueryIndexConfig, top_k=top_k, same_layer=same_layer, batch_size=batch_size)
    texts = check_texts(texts)
    layers = check_layers(layers or index.layers, embedder.model.architecture.num_layers)
    if same_layer and (missing := [layer for layer in layers if layer not in index.layers]):
        raise InputError(f"layers: {missing[0]} is not in the index, which has {', '.join(map(str, index.layers))}")
    states = compression_states(embedder, texts, layers, batch_size, max_length, show_progress_bar)
    n, _, K, D = states.shape
    found = [{} for _ in range(n)]
    for number, layer in enumerate(layers):
        results = index.search(states[:, number].reshape(-1, D), top_k, [layer] if same_layer else None)
        neighbours = [[index.neighbour(*one) for one in zip(*token)] for token in zip(*results)]
        for text in range(n):
            found[text][layer] = neighbours[text * K : (text + 1) * K]
    return found


def in_sentence(tokenizer, ids, position):
    """Returns (before, word, after): the whole word that a token is of, in its sentence, which is cut if it is long."""
    before, through, whole = (tokenizer.decode(part) for part in (ids[:position], ids[: position + 1], ids))
    start, end = len(before), len(through)
    start += len(whole[start:end]) - len(whole[start:end].lstrip())
    if start < end and _LETTER.match(whole[start]):
        start -= len(re.search(rf"{_LETTER.pattern}*$", whole[:start])[0])
    if start < end and _LETTER.match(whole[end - 1]):
        end += len(re.match(rf"{_LETTER.pattern}*", whole[end:])[0])
    left = re.split(r"[.!?] |\n", whole[:start])[-1]
    right = re.match(r".*?(?:[.!?](?= |$)|$)", "" if _ENDED.search(whole[start:end]) else whole[end:], re.MULTILINE)[0]
    left = f"… {left[-_AROUND:].partition(' ')[2]}" if len(left) > _AROUND else left
    right = f"{right[:_AROUND].rpartition(' ')[0]} …" if len(right) > _AROUND else right
    return left, whole[start:end], right
