"""The settings of everything that writes, encodes, reads out, converts and scores."""

import dataclasses

from llm2vec_gen_jax.config.common import (
    BACKBONE_DTYPES,
    DTYPES,
    BackboneConfig,
    DistributedConfig,
    KernelsConfig,
    MeshConfig,
    ShardConfig,
    section,
    setting,
)


@dataclasses.dataclass
class SynthesizeConfig(DistributedConfig):
    """`python -m launch.synthesize`: queries that the LLM itself writes (Magpie, Xu et al. 2024)."""

    backbone: BackboneConfig = section(BackboneConfig)
    output: str | None = setting(None, "JSONL of {id, question}", path=True)
    count: int = setting(1000, "queries to keep, over all shards", least=1)
    batch_size: int = setting(32, "samples per generation batch", least=1)
    max_new_tokens: int = setting(128, "longer samples are dropped", least=1)
    temperature: float = setting(1.0, "of the sampling")
    top_p: float = setting(0.95, "nucleus of the sampling", most=1)
    seed: int = setting(0, "of the sampling")
    overwrite: bool = setting(False, "start anew where output holds another run")
    shard: ShardConfig = section(ShardConfig)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class RespondConfig(DistributedConfig):
    """`python -m launch.respond`: the LLM's own response to every query."""

    backbone: BackboneConfig = section(BackboneConfig)
    input: str | None = setting(None, "JSONL[.gz] of {question} (and id)", path=True)
    output: str | None = setting(None, "JSONL of {id, question, answer, finish}", path=True)
    limit: int | None = setting(None, "only the first so many queries", least=1)
    batch_size: int = setting(32, "prompts per generation batch", least=1)
    max_prompt_length: int = setting(
        1024, "tokens of a prompt, chat template included; longer questions are cut", least=1
    )
    max_new_tokens: int = setting(500, "tokens of a response", least=1)
    temperature: float = setting(0.0, "0: greedy")
    top_p: float = setting(1.0, "nucleus of the sampling", most=1)
    samples: int = setting(1, "responses to each query; more than one need a temperature", least=1)
    seed: int = setting(0, "of the sampling")
    overwrite: bool = setting(False, "start anew where output holds another run")
    shard: ShardConfig = section(ShardConfig)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class EncodeConfig(DistributedConfig):
    """`python -m launch.encode MODEL`: texts to vectors, any number of them.

    Writes OUTPUT/embeddings-00000.npy, -00001 ... with shard_size rows each, in the order of the input, and at the end
    OUTPUT/manifest.json: model, input, settings, and of every file its rows, its SHA-256 and how many of its texts are
    empty, or longer than max_length and so cut. An interrupted run goes on with the same command and ends with the same
    bytes; another model, input or setting is refused. Read the vectors with llm2vec_gen_jax.load_embeddings(OUTPUT).

    Processes that share the work (shard.index, shard.count) each write every shard.count-th file, into one folder or
    folders to be merged, and a manifest of their own, manifest-00000-of-00004.json; nothing is gathered. The files do
    not depend on the number of processes.

    precision=int8 scales each dimension to the range that it has in the first 1024 texts, kept in OUTPUT/ranges.npy;
    what is outside is clipped. binary: the signs, packed in bytes.
    """

    input: str | None = setting(
        None,
        ".txt (a text per line), .jsonl, both also .gz, .parquet, .arrow; folders, saved datasets, patterns, several "
        "with commas; - is standard input",
        path=True,
    )
    output: str | None = setting(None, "directory for the vectors and their manifest", path=True)
    field: str = setting("text", "key or column of the text")
    id_field: str | None = setting(None, "key or column of the id, for format=parquet; else the row number")
    stdin: str = setting("txt", "what standard input holds", ("txt", "jsonl"))
    instruction: str = setting("", "put before every text, with one space")
    batch_size: int = setting(32, "rows of 256 tokens in a pass; short texts share a row", least=1)
    max_length: int = setting(512, "tokens of a text, the compression tokens included", least=1)
    truncate_dim: int | None = setting(None, "keep the first dimensions only", least=1)
    normalize: bool = setting(False, "to unit length, after truncate_dim")
    precision: str = setting("float32", "of the numbers", ("float32", "float16", "int8", "binary"))
    format: str = setting("npy", "of the files; parquet: id and vector", ("npy", "parquet"))
    shard_size: int = setting(10_000, "rows of a file; this many vectors are in memory at a time", least=1)
    save_soft_prompts: bool = setting(False, "also write soft_prompts-00000.npy ..., which `decode` reads")
    warmup: bool = setting(False, "compile every shape before the first text, not when it is first needed")
    dtype: str = setting("auto", "of the backbone", BACKBONE_DTYPES)
    shard: ShardConfig = section(ShardConfig)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class DecodeConfig:
    """`python -m launch.decode MODEL`: the text that the frozen LLM reads out of an embedding's soft prompts."""

    text: str | None = setting(None, "one text to encode and decode")
    input: str | None = setting(None, "a .txt or .jsonl[.gz] file of texts to encode and decode", path=True)
    soft_prompts: str | None = setting(
        None, "the folder that `encode save_soft_prompts=true` wrote, or a .npy (n, K, D) of it", path=True
    )
    output: str | None = setting(None, "JSONL to write; printed when not given", path=True)
    field: str = setting("text", "of the JSONL objects")
    batch_size: int = setting(16, "texts per batch", least=1)
    max_length: int = setting(512, "tokens of a text, the compression tokens included", least=1)
    max_new_tokens: int = setting(128, "tokens of a decoded text", least=1)
    temperature: float = setting(0.0, "0: greedy")
    top_p: float = setting(1.0, "nucleus of the sampling", most=1)
    seed: int = setting(0, "of the sampling")
    dtype: str = setting("auto", "of the backbone", BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class EvaluateConfig:
    """`python -m launch.evaluate MODEL`: scores on task folders, MTEB or BRIGHT, of an embedder or a baseline."""

    tasks: str | None = setting(
        None,
        "a folder of task folders, or hub tasks (mteb-eng-v2, mteb-lite, bright, a task's name); a,b: several",
        path=True,
    )
    output: str | None = setting(None, "directory for results.json; repeat the command to resume it", path=True)
    kind: str = setting(
        "student",
        "student: MODEL is an embedder; teacher: a backbone, mean-pooled; hyde: a backbone whose answers are embedded",
        ("student", "teacher", "hyde"),
    )
    adapters: list[str] = setting(
        [], "teacher, hyde: PEFT LoRA folders or hub ids, merged for the embedding", path=True
    )
    attention: str = setting(
        "auto",
        "teacher, hyde: of the embedding; auto: bidirectional with adapters, causal without",
        ("auto", "causal", "bidirectional"),
    )
    max_new_tokens: int = setting(256, "hyde: tokens of an answer, written greedily", least=1)
    limit: int | None = setting(None, "only the first so many queries or test rows of every task folder", least=1)
    query_instruction: str | None = setting(None, "of every task; null: the task's own (teacher: none)")
    document_instruction: str | None = setting(None, "of every task; null: the task's own (teacher, hyde: none)")
    instructions: str | None = setting(
        None, "YAML {query: {task name: text}, document: text}, over the published ones", path=True
    )
    batch_size: int = setting(32, "texts per batch", least=1)
    max_length: int | None = setting(None, "tokens of a text; null: as published (512, BRIGHT 4096)", least=1)
    overwrite: bool = setting(False, "start anew where output holds another evaluation")
    dtype: str = setting("auto", "of the backbone", BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class FromPytorchConfig:
    """`python -m launch.convert from_pytorch MODEL`: a published PyTorch directory or hub id to a model directory."""

    output: str | None = setting(None, "new model directory; PyTorch reads it as well", path=True)
    backbone: str | None = setting(None, "where the backbone is, if not where the model says", path=True)
    dtype: str = setting("auto", "in which the backbone is loaded", DTYPES)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class ToPytorchConfig:
    """`python -m launch.convert to_pytorch MODEL`: a model or run directory to what PyTorch needs to run it alone."""

    output: str | None = setting(None, "new model directory in the published layout", path=True)
    backbone_output: str | None = setting(
        None,
        "new folder for the backbone; default OUTPUT-backbone where the backbone is a GGUF file, else none",
        path=True,
    )
    merged: str | None = setting(
        None,
        "new folder for the encoder as a plain transformers model: LoRA merged, trained tokens in its table",
        path=True,
    )
    torch_dtype: str = setting("auto", "in which PyTorch is to run; auto: as it was", DTYPES)
    backbone: str | None = setting(None, "where the backbone is, if not where the model says", path=True)
    dtype: str = setting("auto", "of the written backbone weights", DTYPES)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class VerifyConfig:
    """`python -m launch.convert verify MODEL`: encode and decode in both frameworks, compare; exit code 1 on FAIL."""

    python: str | None = setting(
        None,
        "Python of an environment with PyTorch (best with llm2vec-gen in it); default the one that runs this",
        path=True,
    )
    backbone: str | None = setting(None, "where the backbone is, if not where the model says", path=True)
    max_new_tokens: int = setting(16, "tokens decoded from each of two embeddings", least=1)
