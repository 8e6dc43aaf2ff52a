"""Index of the latent lens: hidden states of the words of a corpus in context.

After LatentLens (McGill-NLP/latentlens): a state is described by the words in context with the nearest states.
"""

import functools
import hashlib
import itertools
import logging
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from llm2vec_gen_jax.common import locks, progress
from llm2vec_gen_jax.common.errors import InputError, not_finite, quote
from llm2vec_gen_jax.common.files import (
    new_array,
    read_json,
    require_new,
    require_same_run,
    require_written,
    sha256_file,
    write_json,
)
from llm2vec_gen_jax.config import HUB_KEYS, BuildIndexConfig, hub_options, options
from llm2vec_gen_jax.data.buckets import bucket_length, longest_first, pad
from llm2vec_gen_jax.data.texts import Corpus
from llm2vec_gen_jax.inference import postprocess
from llm2vec_gen_jax.lens.states import check_layers
from llm2vec_gen_jax.model.execution import platform_jit
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.pretrained.backbone import load_backbone

logger = logging.getLogger(__name__)

RECORD = "index.json"
_PROGRESS = "progress.json"
_FIRST = 2  # the first two tokens are attention sinks: their states do not depend on the text
_TOKENIZED = 512  # texts per call of the tokenizer
_TEXTS = ("contexts.npy", "offsets.npy", "ids.npy")
_HASHED = 8192  # vectors read at a time to verify the digest
_FLUSH_EVERY = 20  # passes between progress records


def layer_file(layer: int) -> str:
    """Returns the file name of a layer's vectors."""
    return f"layer-{layer:02}.npy"


def default_layers(num_layers: int) -> list[int]:
    """Returns the layers that latentlens uses (1, 2, 4, ... and the two before the last), and the last."""
    early = [layer for layer in (1, 2, 4, 8, 16, 24) if layer < num_layers]
    return sorted({*early, *range(max(num_layers - 2, 0), num_layers + 1)})


def build_index(path: str | os.PathLike[str], config: BuildIndexConfig) -> int:
    """Writes the index of a BuildIndexConfig for the backbone of the model at `path`. Returns the number of contexts.

    Repeating an interrupted call resumes it and writes the same bytes.
    Raises InputError for invalid input, and naming the difference if the output belongs to another index.
    """
    options.require(config)
    with locks.locked(str(config.output), "output"):
        count = _build_index(path, config)
        require_written(pathlib.Path(str(config.output), RECORD))
        return count


def _build_index(path, config):
    require_new(config.output, "output")
    output = pathlib.Path(str(config.output))
    corpus = Corpus(config.input, config.field)
    if corpus.streamed:
        raise InputError("input=-: an index is built from files, which a repeated command can read again")
    hub = hub_options(config, config.revision)
    name, hub = model_directory.backbone_source(model_directory.read_model_directory(str(path), hub), hub)
    backbone = load_backbone(name, config.dtype, sharding.make_mesh(config.mesh), config.kernels.attention, hub)
    num_layers = backbone.architecture.num_layers
    layers = check_layers(config.layers, num_layers) or default_layers(num_layers)
    partial = output.with_name(f"{output.name}.partial")
    if not (partial / _PROGRESS).exists():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    run = _run_record(backbone, corpus, config, layers)
    _begin(partial, backbone, corpus, config, run)
    _fill(partial, backbone, config, run)
    count = len(np.load(partial / "contexts.npy", mmap_mode="r"))
    names = sorted([*_TEXTS, *map(layer_file, layers)])  # a removed file is an error
    hashes = {name: sha256_file(partial / name) for name in names}
    write_json(partial / RECORD, {**run, "count": count, "dimension": _width(backbone), "sha256": hashes})
    os.rename(partial, output)
    # Not before: without this file a repeated command begins again.
    (output / _PROGRESS).unlink(missing_ok=True)
    return count


def _run_record(backbone, corpus, config, layers):
    """Returns everything that determines the bytes of an index."""
    settings = options.to_dict(config)
    for key in ("input", "output", "revision", *HUB_KEYS):  # the backbone has an identity instead of a revision
        settings.pop(key, None)
    settings["layers"] = layers
    settings["dtype"] = backbone.dtype
    settings["mesh"] = dict(backbone.mesh.shape)
    return {
        "backbone": backbone.identity,
        "tokenizer": backbone.tokenizer.identity,
        "input": corpus.identity(),
        "config": settings,
    }


def _width(backbone):
    return backbone.architecture.hidden_size


def choose_contexts(ids: Sequence[np.ndarray], limit: int, per_token: int, seed: int) -> NDArray[np.int32]:
    """Samples tokens of texts. Returns at most `limit` rows (text, position), sorted: (n, 2).

    Excluded are the first two tokens of a text, duplicates with an equal prefix (their states are equal), and more
    than per_token contexts of the same token.
    """
    lengths = np.array([len(row) for row in ids], np.int64)
    starts = np.cumsum(lengths) - lengths
    flat = np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.uint64)
    text = np.repeat(np.arange(len(ids)), lengths)
    position = np.arange(len(flat)) - starts[text]
    # A prefix is identified by the sum of the hashes of its (token, position) pairs.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mix(flat + (position.astype(np.uint64) << 32)))])
    prefix = sums[1:] - sums[starts[text]]
    candidates = np.flatnonzero(position >= _FIRST)
    candidates = candidates[np.unique(prefix[candidates], return_index=True)[1]]
    drawn = np.random.default_rng(seed).permutation(np.sort(candidates))
    by_token = np.argsort(flat[drawn], kind="stable")
    token = flat[drawn][by_token]
    rank = np.empty(len(drawn), np.int64)
    rank[by_token] = np.arange(len(drawn)) - np.searchsorted(token, token)
    chosen = np.sort(drawn[rank < per_token][:limit])
    return np.stack([text[chosen], position[chosen]], axis=1).astype(np.int32)


def _mix(x):
    """SplitMix64's finalizer of uint64 numbers (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _begin(partial, backbone, corpus, config, run):
    """Writes contexts and texts and allocates the vectors, or verifies those of an earlier call with an equal `run`."""
    if (partial / _PROGRESS).exists():
        remedy = "choose another output, or remove it"
        require_same_run(partial, read_json(partial / _PROGRESS)["run"], run, remedy)
        if _is_valid(partial):
            return
        logger.warning(f"{partial}: modified after it was written; started again")
        (partial / _PROGRESS).unlink()
    ids, texts = [], [row.text for row in itertools.islice(corpus.read(), config.limit)]
    with progress.bar(len(texts), "text", "tokenize") as bar:
        for start in range(0, len(texts), _TOKENIZED):
            part = texts[start : start + _TOKENIZED]
            ids += [np.array(row, np.int32) for row in backbone.tokenizer.encode(part, config.max_length, start)]
            bar.update(len(part))
    contexts = choose_contexts(ids, config.contexts, config.contexts_per_token, config.seed)
    if not len(contexts):
        raise InputError(f"input={config.input}: no text of more than {_FIRST} tokens")
    # Texts are sorted by the position of their last context, descending: the texts of a pass have similar lengths.
    ends = np.zeros(len(ids), np.int32)
    np.maximum.at(ends, contexts[:, 0], contexts[:, 1] + 1)
    order = np.flatnonzero(ends)
    order = order[longest_first(ends[order])]
    rank = np.zeros(len(ids), np.int32)
    rank[order] = np.arange(len(order))
    contexts[:, 0] = rank[contexts[:, 0]]
    np.save(partial / "contexts.npy", contexts[np.lexsort(contexts.T[::-1])])
    np.save(partial / "offsets.npy", np.cumsum([0, *(len(ids[text]) for text in order)]))
    np.save(partial / "ids.npy", np.concatenate([ids[text] for text in order]))
    for layer in run["config"]["layers"]:
        new_array(partial / layer_file(layer), (len(contexts), _width(backbone)), run["config"]["precision"])
    _write_progress(partial, {}, run, {name: sha256_file(partial / name) for name in _TEXTS}, 0)


def _is_valid(partial):
    """Returns whether the files of an interrupted call match their record."""
    record = read_json(partial / _PROGRESS)
    texts = {name: sha256_file(partial / name) for name in _TEXTS if (partial / name).exists()}
    return texts == record.get("sha256") and _digests(partial, record) is not None


def _digests(partial, record):
    """Returns {layer: (array, hash of its computed vectors)}; None if one does not match the record."""
    digests = {}
    for layer in record["run"]["config"]["layers"]:
        try:
            array = np.lib.format.open_memmap(partial / layer_file(layer), "r+")
        except (OSError, ValueError, EOFError):
            return None
        digest = hashlib.sha256()
        for start in range(0, record["done"], _HASHED):
            digest.update(array[start : min(start + _HASHED, record["done"])].tobytes())
        if record["done"] and record.get("layers", {}).get(str(layer)) != digest.hexdigest():
            return None
        digests[layer] = array, digest
    return digests


def _fill(partial, backbone, config, run):
    """Computes the missing vectors."""
    contexts, offsets, flat = (np.load(partial / f"{name}.npy") for name in ("contexts", "offsets", "ids"))
    record = read_json(partial / _PROGRESS)
    layers, done, arrays = run["config"]["layers"], record["done"], _digests(partial, record)
    shards = sharding.batch_shards(backbone.mesh)
    size = -(-config.batch_size // shards) * shards
    model = LLM2VecGenModel(backbone.architecture, 1, 0, _width(backbone), execution=backbone.execution)
    firsts = np.searchsorted(contexts[:, 0], np.arange(len(offsets)))  # first context of each text
    with progress.bar(len(contexts), "context", "index", initial=done) as bar:
        for number, start in enumerate(range(0, len(offsets) - 1, size)):
            end = min(start + size, len(offsets) - 1)
            first, last = firsts[start], firsts[end]
            if last <= done:
                continue
            rows = contexts[first:last]
            ends = contexts[firsts[start + 1 : end + 1] - 1, 1] + 1  # later tokens do not affect the states
            ids = [flat[offset : offset + length] for offset, length in zip(offsets[start:], ends)]
            ids_BT = pad([*ids, *[[]] * (size - len(ids))], bucket_length(ends[0]))
            where = rows[:, 0] - start, np.arange(first, last) - firsts[rows[:, 0]]
            index_BP = np.zeros((size, bucket_length(1 + where[1].max())), np.int32)
            index_BP[where] = rows[:, 1]
            batch = sharding.put_batch((ids_BT, index_BP), backbone.mesh)
            states = np.asarray(_states(model, tuple(layers), backbone.frozen, *batch))
            for text in where[0][~np.isfinite(states[:, *where]).all(axis=(0, 2))]:
                beginning = quote(backbone.tokenizer.decode(ids[text].tolist()))
                raise not_finite(f"{config.input}: {beginning}", backbone.dtype)
            for (array, digest), states_BPD in zip(arrays.values(), states):
                array[first:last] = postprocess.l2_normalize(states_BPD[where].astype(np.float32))
                digest.update(array[first:last].tobytes())
            bar.update(len(rows))
            if number % _FLUSH_EVERY == _FLUSH_EVERY - 1:
                _write_progress(partial, arrays, run, record["sha256"], int(last))
    _write_progress(partial, arrays, run, record["sha256"], len(contexts))


def _write_progress(partial, arrays, run, texts, done):
    for array, _ in arrays.values():
        array.flush()
    layers = {str(layer): digest.hexdigest() for layer, (_, digest) in arrays.items()}
    write_json(partial / _PROGRESS, {"run": run, "done": done, "sha256": texts, "layers": layers})


@functools.partial(platform_jit, static_argnums=(1,))
def _states(
    model: LLM2VecGenModel, layers: tuple[int, ...], frozen: Any, ids_BT: jax.Array, index_BP: jax.Array
) -> jax.Array:
    return model.states_of_text(frozen, ids_BT, index_BP, layers)
