"""Alignment targets: the teacher's vectors of the responses, computed once and stored, or read from a file."""

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from llm2vec_gen_jax.common.errors import InputError, first_line, not_finite, quote
from llm2vec_gen_jax.common.files import fingerprint, install_command, read_array, sha256_file, visible
from llm2vec_gen_jax.config import EvaluateConfig, TeacherConfig, TrainConfig, hub_options
from llm2vec_gen_jax.data.buckets import choose_edges
from llm2vec_gen_jax.formats import peft
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import (
    EMBEDDER_PATTERNS,
    LoadedBackbone,
    load_backbone,
    open_checkpoint,
    resolve_adapter,
    resolve_dtype,
    resolve_embedder,
)
from llm2vec_gen_jax.teachers.encoder import pool_rows
from llm2vec_gen_jax.teachers.target_files import compute_once


def is_causal(config: TeacherConfig | EvaluateConfig) -> bool:
    """Returns whether the llm2vec teacher of a config uses causal attention.

    `auto` is causal without adapters: a backbone not trained for bidirectional attention is far worse with it.
    """
    return config.attention == "causal" or (config.attention == "auto" and not config.adapters)


def read_targets(path: str | os.PathLike[str], records: int, rows: np.ndarray) -> NDArray[np.float32]:
    """Returns rows of a .npy file of targets (records, E) as an array (len(rows), E).

    Raises InputError for any other file.
    """
    targets = read_array(path, "teacher.path")
    if targets.ndim != 2 or len(targets) != records or not np.issubdtype(targets.dtype, np.floating):
        raise InputError(
            f"teacher.path={path}: expected a float array ({records} rows of data.responses, E), "
            f"found {targets.dtype} {targets.shape}"
        )
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinite
        targets = np.asarray(targets[rows], np.float32)
    if not (is_finite := np.isfinite(targets).all(axis=1)).all():
        raise InputError(f"teacher.path={path}: row {rows[np.argmin(is_finite)]} (from 0) holds NaN or infinity")
    return targets


def compute_mixed_targets(
    backbone: LoadedBackbone, config: TrainConfig, answers: Sequence[str], queries: Sequence[str], responses: str
) -> NDArray[np.float32]:
    """Returns the targets (n, E) of stripped answers, mixed with the vectors of their queries by teacher.query_weight.

    See compute_targets. Vectors with weight 0 are not computed.
    """
    weight = config.teacher.query_weight
    parts = [
        np.float32(share) * compute_targets(backbone, config, texts, responses)
        for share, texts in ((1 - weight, answers), (weight, queries))
        if share
    ]
    return sum(parts[1:], parts[0])


def compute_targets(
    backbone: LoadedBackbone, config: TrainConfig, answers: Sequence[str], responses: str
) -> NDArray[np.float32]:
    """Returns the targets (n, E) of stripped answers, computed by the teacher of a TrainConfig.

    They are stored next to the file `responses` under a hash of teacher and texts; an interrupted computation is
    resumed. backbone: that of the config; its weights are reused if they are loaded and equal to the teacher's.
    """
    if config.teacher.kind == "sentence_transformers":
        return _by_sentence_transformers(config.teacher, hub_options(config), answers, responses)
    return _by_llm2vec(backbone, config, answers, responses)


def _by_llm2vec(backbone, config, answers, responses):
    """Targets of an llm2vec teacher: mean-pooled last hidden states, so E is the hidden size of its backbone."""
    path, mesh, attention = config.teacher.path, backbone.mesh, backbone.execution.attention
    hub = hub_options(config)
    adapters = [resolve_adapter(adapter, hub) for adapter in config.teacher.adapters]
    causal = is_causal(config.teacher)
    reader = open_checkpoint(path, backbone.execution, hub)[0] if path else backbone
    dtype = backbone.dtype if backbone.frozen is not None else str(resolve_dtype(config.backbone.dtype))
    quantized = dtype == "int8"  # targets are computed with the weights before quantization
    dtype = "bfloat16" if quantized else dtype
    ids = reader.tokenizer.encode(answers, config.data.max_answer_length)
    key = {
        "backbone": reader.identity,
        "dtype": dtype,
        "adapters": [peft.identity(adapter) for adapter in adapters],
        "causal": causal,
        "ids": fingerprint(ids),
    }
    shards = sharding.batch_shards(mesh)
    batch_size = -(-config.teacher.batch_size // shards) * shards
    edges = choose_edges([len(row) for row in ids], 8)

    def make():
        frozen = backbone.frozen
        if path or adapters or quantized or frozen is None:  # merging donates its input
            access = hub if path else hub_options(config, config.backbone.revision)
            loaded = load_backbone(path or config.backbone.path, dtype, mesh, attention, access)
            if loaded.identity != reader.identity:
                raise InputError(
                    f"backbone.path={config.backbone.path}: has different weights from the loaded backbone"
                )
            frozen = loaded.frozen
        frozen = peft.merge(frozen, adapters, reader.architecture)

        def embed(rows):
            batch = [ids[row] for row in rows]
            width = edges[np.searchsorted(edges, max(map(len, batch)))]
            vectors = pool_rows(reader.architecture, frozen, causal, batch, (batch_size, width), backbone.execution)
            for row in rows[~np.isfinite(vectors).all(axis=1)]:
                raise not_finite(f"{responses}: the target of {quote(answers[row])}", dtype)
            return vectors

        return embed, reader.architecture.hidden_size

    return compute_once(responses, key, [len(row) for row in ids], batch_size, make, together=True)


def _by_sentence_transformers(config, hub, answers, responses):
    """Targets of a sentence-transformers model, which truncates texts to its max_seq_length."""
    if config.path is None:
        raise InputError("teacher.path is required: the folder or hub id of a sentence-transformers model")
    folder = resolve_embedder(config.path, hub)
    files = sorted({path for pattern in EMBEDDER_PATTERNS for path in visible(folder, pattern)})
    key = {
        "embedder": {str(path.relative_to(folder)): sha256_file(path) for path in files},
        "prompt": config.prompt,
        "normalize": config.normalize,
        "texts": fingerprint(answers),
    }

    def make():
        embedder = _load_embedder(config.path, folder)

        def embed(rows):
            vectors = embedder.encode_document(
                [answers[row] for row in rows],
                prompt=config.prompt,
                batch_size=config.batch_size,
                normalize_embeddings=config.normalize,
                show_progress_bar=False,
            )
            for row in np.asarray(rows)[~np.isfinite(vectors).all(axis=1)]:
                name = f"teacher.path={config.path}: the vector of {quote(answers[row])}"
                raise InputError(f"{name} holds NaN or infinity")
            return vectors

        return embed, embed([0]).shape[1]

    return compute_once(responses, key, [len(answer) for answer in answers], config.batch_size, make)


def _load_embedder(path, folder):
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(
            f"teacher.kind=sentence_transformers needs sentence-transformers: {install_command('teachers')} ({error})"
        ) from None
    try:
        return SentenceTransformer(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"teacher.path={path}: not a sentence-transformers model ({first_line(error)})") from None
