"""Settings of the `lens` command, which shows what embeddings encode."""

import dataclasses
from typing import ClassVar

from llm2vec_gen_jax.config.common import (
    BACKBONE_DTYPES,
    DTYPE_HELP,
    KernelsConfig,
    MeshConfig,
    ModelHubConfig,
    section,
    setting,
)

READINGS = ("hidden", "soft_prompts")
PROJECTIONS = ("pca", "umap")
_INPUT_HELP = ".txt, .jsonl, .csv or .parquet file of texts, or a hub dataset id"


@dataclasses.dataclass
class TextsConfig(ModelHubConfig):
    """Settings shared by the lenses that print a table of texts."""

    text: str | None = setting(None, "single text")
    input: str | None = setting(None, _INPUT_HELP, path=True)
    field: str = setting("text", "key or column of the text")
    limit: int | None = setting(None, "maximum number of texts; null: all", least=1)
    output: str | None = setting(None, "output JSONL file; null: print a table", path=True)
    top_k: int = setting(5, "tokens, words or neighbors per compression token", least=1)
    batch_size: int = setting(16, "rows of 256 tokens per batch; short texts share a row", least=1)
    max_length: int = setting(512, "maximum tokens per text, including the compression tokens", least=1)
    dtype: str = setting("auto", DTYPE_HELP, BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class LogitLensConfig(TextsConfig):
    """`python -m launch.lens logit MODEL`: top vocabulary entries for each compression token (logit lens)."""

    EXAMPLE: ClassVar = 'smollm2-135m text="What is the capital of France?"'

    state: str = setting(
        "hidden",
        "vector projected to the vocabulary; hidden: last hidden state, as published; soft_prompts: decoder input",
        READINGS,
    )
    words: bool = setting(True, "whole words, with spelling variants merged and subwords skipped; false: raw tokens")
    stop_words: bool = setting(False, "include English stop words, with words=true")


@dataclasses.dataclass
class BuildIndexConfig(ModelHubConfig):
    """`python -m launch.lens build_index MODEL`: index hidden states of MODEL's backbone on a corpus (latent lens).

    Writes OUTPUT/layer-00.npy ... (L2-normalized hidden states of one layer), contexts.npy, ids.npy, offsets.npy and
    index.json. Until it is complete, the index is in OUTPUT.partial; repeat an interrupted command to resume.
    """

    REQUIRED: ClassVar = ("input", "output")
    EXAMPLE: ClassVar = "smollm2-135m input=texts.txt output=index"

    input: str | None = setting(None, "input files, folders and glob patterns, as for `encode`", path=True)
    field: str = setting("text", "key or column of the text")
    output: str | None = setting(None, "new folder for the index", path=True)
    limit: int | None = setting(None, "maximum number of texts; null: all", least=1)
    layers: list[str] = setting(
        [], "layers to index; 0: embeddings, 1: output of the first layer, ...; []: a selection"
    )
    contexts: int = setting(100_000, "number of sampled corpus tokens in the index", least=1)
    contexts_per_token: int = setting(50, "maximum number of contexts with the same token", least=1)
    seed: int = setting(0, "seed for sampling contexts")
    max_length: int = setting(256, "maximum tokens per text", least=3)
    batch_size: int = setting(32, "texts per batch", least=1)
    precision: str = setting("float16", "precision of the indexed vectors", ("float32", "float16"))
    dtype: str = setting("auto", DTYPE_HELP, BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class QueryIndexConfig(TextsConfig):
    """`python -m launch.lens query MODEL`: nearest indexed contexts of each compression token, per layer."""

    REQUIRED: ClassVar = ("index",)
    EXAMPLE: ClassVar = 'smollm2-135m index=index text="What is the capital of France?"'

    index: str | None = setting(None, "index folder written by build_index", path=True)
    layers: list[str] = setting([], "layers of the compression tokens; []: the indexed layers")
    same_layer: bool = setting(False, "search only contexts of the same layer; false: all layers, as published")


@dataclasses.dataclass
class GenerationsConfig(ModelHubConfig):
    """`python -m launch.lens generations MODEL`: decode the embeddings of a sample of a dataset into text.

    Writes {input_text, output_text}, as the published script does; seed 42 selects the same sample.
    """

    REQUIRED: ClassVar = ("input", "output")
    EXAMPLE: ClassVar = "smollm2-135m input=texts.txt output=generations.csv"

    input: str | None = setting(None, _INPUT_HELP, path=True)
    field: str = setting("text", "key or column of the text")
    output: str | None = setting(None, "output .csv or .jsonl file", path=True)
    limit: int | None = setting(100, "number of sampled texts; null: all", least=1)
    seed: int = setting(42, "seed for sampling texts")
    max_new_tokens: int = setting(500, "maximum tokens per decoded text", least=1)
    batch_size: int = setting(16, "texts per batch", least=1)
    max_length: int = setting(512, "maximum tokens per text, including the compression tokens", least=1)
    dtype: str = setting("auto", DTYPE_HELP, BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class ReportConfig(ModelHubConfig):
    """`python -m launch.lens report MODEL`: write an HTML page about the embeddings of some texts.

    The map compares MODEL with its teacher: by default the llm2vec teacher recorded in MODEL, if any; `adapters` and
    `attention` select another.
    """

    REQUIRED: ClassVar = ("input", "output")
    EXAMPLE: ClassVar = "smollm2-135m input=texts.txt output=report.html"

    input: str | None = setting(None, _INPUT_HELP, path=True)
    field: str = setting("text", "key or column of the text")
    output: str | None = setting(None, "new .html file", path=True)
    limit: int = setting(50, "maximum number of texts", least=1)
    index: str | None = setting(None, "index folder written by build_index, for the latent lens", path=True)
    top_k: int = setting(5, "words and neighbors per compression token", least=1)
    nearest: int = setting(3, "nearest other texts shown for each text", least=0)
    max_new_tokens: int = setting(96, "maximum tokens per answer and per decoded text", least=1)
    adapters: list[str] = setting(
        [], "PEFT LoRA folders or hub ids of the map's teacher; []: those recorded in MODEL", path=True
    )
    attention: str = setting("auto", "attention of the map's teacher", ("auto", "causal", "bidirectional"))
    projection: str = setting("pca", "projection of the map; umap requires the package umap-learn", PROJECTIONS)
    batch_size: int = setting(16, "texts per batch", least=1)
    max_length: int = setting(512, "maximum tokens per text, including the compression tokens", least=1)
    dtype: str = setting("auto", DTYPE_HELP, BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)
