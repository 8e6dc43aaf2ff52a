"""The settings of everything that shows what is in an embedding."""

import dataclasses

from llm2vec_gen_jax.config.common import BACKBONE_DTYPES, KernelsConfig, MeshConfig, section, setting

READINGS = ("hidden", "soft_prompts")
PROJECTIONS = ("pca", "umap")


@dataclasses.dataclass
class TextsConfig:
    """What every reading of texts takes."""

    text: str | None = setting(None, "one text")
    input: str | None = setting(None, "a .txt or .jsonl[.gz] file of texts, or a dataset of the hub", path=True)
    field: str = setting("text", "of the JSONL objects")
    limit: int | None = setting(None, "only the first so many texts", least=1)
    output: str | None = setting(None, "JSONL to write; a table is printed when not given", path=True)
    top_k: int = setting(5, "tokens, words or neighbours of each compression token", least=1)
    batch_size: int = setting(16, "rows of 256 tokens in a pass; short texts share a row", least=1)
    max_length: int = setting(512, "tokens of a text, the compression tokens included", least=1)
    dtype: str = setting("auto", "of the backbone", BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class LogitLensConfig(TextsConfig):
    """`python -m launch.lens logit MODEL`: the vocabulary as each compression token's state ranks it."""

    state: str = setting(
        "hidden", "hidden: the last hidden state, as published; soft_prompts: what the decoder reads", READINGS
    )
    words: bool = setting(True, "whole words: spellings merged, pieces of words left out; false: tokens as they are")
    stop_words: bool = setting(False, "keep English function words among the whole words")


@dataclasses.dataclass
class BuildIndexConfig:
    """`python -m launch.lens build_index MODEL`: hidden states of a corpus under MODEL's backbone, for the latent lens.

    Writes OUTPUT/layer-00.npy ... (unit vectors of every context in a layer), contexts.npy, ids.npy, offsets.npy and
    index.json. The folder appears when it is complete; until then OUTPUT.partial is what the same command continues.
    """

    input: str | None = setting(None, "texts: the files, folders and patterns that `encode` reads", path=True)
    field: str = setting("text", "key or column of the text")
    output: str | None = setting(None, "new folder", path=True)
    limit: int | None = setting(None, "only the first so many texts, all of which are computed", least=1)
    layers: list[str] = setting([], "0: embeddings, 1: result of the first layer ...; default a spread to the last")
    contexts: int = setting(100_000, "tokens of the corpus to keep, drawn by seed", least=1)
    contexts_per_token: int = setting(50, "of them with the same token at most", least=1)
    seed: int = setting(0, "of the draw")
    max_length: int = setting(256, "tokens of a text", least=3)
    batch_size: int = setting(32, "texts in a pass", least=1)
    precision: str = setting("float16", "of the vectors", ("float32", "float16"))
    dtype: str = setting("auto", "of the backbone", BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class QueryIndexConfig(TextsConfig):
    """`python -m launch.lens query MODEL`: an index's contexts nearest to each compression token, in each layer."""

    index: str | None = setting(None, "a folder that build_index wrote", path=True)
    layers: list[str] = setting([], "of the compression tokens; default those of the index")
    same_layer: bool = setting(False, "compare with contexts of the same layer; false: of every layer, as published")


@dataclasses.dataclass
class GenerationsConfig:
    """`python -m launch.lens generations MODEL`: text decoded from the embeddings of a sample of a dataset.

    Writes {input_text, output_text}, the published script's table; the sample of seed 42 is that script's as well.
    """

    input: str | None = setting(None, "a .txt or .jsonl[.gz] file of texts, or a dataset of the hub", path=True)
    field: str = setting("text", "of the JSONL objects")
    output: str | None = setting(None, ".csv or .jsonl to write", path=True)
    limit: int | None = setting(100, "texts, drawn by seed; null: all of them", least=1)
    seed: int = setting(42, "of the draw")
    max_new_tokens: int = setting(500, "tokens of a decoded text", least=1)
    batch_size: int = setting(16, "texts per batch", least=1)
    max_length: int = setting(512, "tokens of a text, the compression tokens included", least=1)
    dtype: str = setting("auto", "of the backbone", BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class ReportConfig:
    """`python -m launch.lens report MODEL`: one HTML page of what the embeddings of some texts hold.

    The map's teacher is the one that MODEL was trained with, if MODEL says so and it is an llm2vec teacher; `adapters`
    and `attention` set another.
    """

    input: str | None = setting(None, "a .txt or .jsonl[.gz] file of texts, or a dataset of the hub", path=True)
    field: str = setting("text", "of the JSONL objects")
    output: str | None = setting(None, "new .html file", path=True)
    limit: int = setting(50, "only the first so many texts", least=1)
    index: str | None = setting(None, "a folder that build_index wrote, for the latent lens", path=True)
    top_k: int = setting(5, "words and neighbours of each compression token", least=1)
    nearest: int = setting(3, "other texts shown beside each", least=0)
    max_new_tokens: int = setting(96, "tokens of an answer and of a decoded text", least=1)
    adapters: list[str] = setting(
        [], "PEFT LoRA folders or hub ids of the map's teacher; default as trained", path=True
    )
    attention: str = setting("auto", "of the map's teacher", ("auto", "causal", "bidirectional"))
    projection: str = setting("pca", "of the map; umap needs the package umap-learn", PROJECTIONS)
    batch_size: int = setting(16, "texts per batch", least=1)
    max_length: int = setting(512, "tokens of a text, the compression tokens included", least=1)
    dtype: str = setting("auto", "of the backbone", BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)
