"""Settings of the commands that generate, encode, decode, convert and evaluate."""

import dataclasses
from typing import ClassVar

from llm2vec_gen_jax.config.common import (
    BACKBONE_DTYPES,
    DTYPE_HELP,
    DTYPES,
    BackboneConfig,
    DistributedConfig,
    HubConfig,
    KernelsConfig,
    MeshConfig,
    ModelHubConfig,
    ShardConfig,
    section,
    setting,
)


@dataclasses.dataclass
class SynthesizeConfig(HubConfig, DistributedConfig):
    """`python -m launch.synthesize`: generate queries with the LLM itself (Magpie, Xu et al. 2024)."""

    REQUIRED: ClassVar = ("output",)
    EXAMPLE: ClassVar = "output=queries.jsonl count=100"

    backbone: BackboneConfig = section(BackboneConfig)
    output: str | None = setting(None, "output JSONL file of {id, question}", path=True)
    count: int = setting(1000, "number of queries to generate, over all shards", least=1)
    batch_size: int = setting(32, "samples per generation batch", least=1)
    max_new_tokens: int = setting(128, "maximum tokens per query; longer samples are dropped", least=1)
    temperature: float = setting(1.0, "sampling temperature")
    top_p: float = setting(0.95, "nucleus sampling probability", most=1)
    seed: int = setting(0, "sampling seed")
    overwrite: bool = setting(False, "replace an output written with other settings")
    shard: ShardConfig = section(ShardConfig)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class RespondConfig(HubConfig, DistributedConfig):
    """`python -m launch.respond`: generate the LLM's response to every query.

    engine=openai sends the queries to a server with OpenAI's chat completions API instead of loading a backbone. Then
    batch_size and max_prompt_length are not used, and responses are written in the order in which they complete.
    """

    REQUIRED: ClassVar = ("input", "output")
    EXAMPLE: ClassVar = "input=queries.jsonl output=responses.jsonl max_new_tokens=100"

    engine: str = setting("backbone", "what generates; openai: the server at `endpoint`", ("backbone", "openai"))
    endpoint: str | None = setting(None, "engine=openai: URL of the API, such as http://localhost:8000/v1")
    model: str | None = setting(None, "engine=openai: model name on the server; null: its only one")
    api_key_env: str = setting("OPENAI_API_KEY", "engine=openai: environment variable of the API key, if one is needed")
    concurrency: int = setting(16, "engine=openai: requests at a time", least=1, most=1024)
    request_timeout: int = setting(600, "engine=openai: seconds to wait for a response", least=1)
    backbone: BackboneConfig = section(BackboneConfig)
    input: str | None = setting(
        None, "queries: .txt (one per line), or .jsonl, .csv or .parquet with question and an optional id", path=True
    )
    output: str | None = setting(None, "output JSONL file of {id, question, answer, finish}", path=True)
    limit: int | None = setting(None, "maximum number of queries; null: all", least=1)
    batch_size: int = setting(32, "prompts per generation batch", least=1)
    max_prompt_length: int = setting(
        1024, "maximum tokens per prompt, including the chat template; longer questions are truncated", least=1
    )
    max_new_tokens: int = setting(500, "maximum tokens per response", least=1)
    temperature: float = setting(0.0, "sampling temperature; 0: greedy decoding")
    top_p: float = setting(1.0, "nucleus sampling probability", most=1)
    samples: int = setting(1, "responses per query; more than one requires a temperature above 0", least=1)
    seed: int = setting(0, "sampling seed")
    overwrite: bool = setting(False, "replace an output written with other settings")
    shard: ShardConfig = section(ShardConfig)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class InstructConfig:
    """`python -m launch.instruct`: turn unlabeled texts into training records with an instruction before each text.

    The answer of a record is the text itself, so that training needs no generation. Evaluation puts an instruction
    before sentences and passages, a form that bare questions lack. Concatenate the output with that of `respond` to
    train on both.
    """

    REQUIRED: ClassVar = ("input", "output")
    EXAMPLE: ClassVar = 'input=texts.txt output=records.jsonl instruction="Summarize:"'

    input: str | None = setting(
        None, "unlabeled texts: files, folders, saved datasets or patterns, as for `encode`", path=True
    )
    output: str | None = setting(None, "output JSONL file of {id, question, answer}", path=True)
    field: str = setting("text", "key or column of the text")
    instruction: str = setting("", "instruction prepended to every text, separated by a space")
    instructions: str | None = setting(
        None, "text file of instructions, one per line, assigned to the texts in turn; a blank line: none", path=True
    )
    unit: str = setting(
        "text",
        "part of each text to use; passage: longest paragraph, of at least 8 words; sentence: each sentence of that "
        "paragraph, of at least 4 words",
        ("text", "passage", "sentence"),
    )
    max_words: int = setting(110, "words after which a text is cut", least=1)
    count: int | None = setting(None, "number of records, a random sample of the distinct texts; null: all", least=1)
    exclude: str | None = setting(None, "folder of task folders whose queries and test rows are left out", path=True)
    seed: int = setting(0, "shuffling seed")
    overwrite: bool = setting(False, "replace an output written with other settings")


@dataclasses.dataclass
class EncodeConfig(ModelHubConfig, DistributedConfig):
    """`python -m launch.encode MODEL`: encode a corpus of any size into embeddings.

    Writes OUTPUT/embeddings-00000.npy, -00001 ... with shard_size rows each, in input order, then OUTPUT/manifest.json:
    model, input, settings and, for each file, its rows, SHA-256, and the number of empty and truncated texts (longer
    than max_length). To resume an interrupted run, repeat the command: the files are identical to those of an
    uninterrupted run. Another model, input or setting is an error. Read the embeddings with
    llm2vec_gen_jax.load_embeddings(OUTPUT).

    Several processes (shard.index, shard.count) each write every shard.count-th file, to one folder or to folders that
    are merged later, and each its own manifest, manifest-00000-of-00004.json. The files do not depend on the number of
    processes.

    precision=int8 scales each dimension to its range in the first 1024 texts, saved in OUTPUT/ranges.npy; values
    outside the range are clipped. precision=binary packs the signs into bytes.
    """

    REQUIRED: ClassVar = ("input", "output")
    EXAMPLE: ClassVar = "smollm2-135m input=texts.txt output=vectors"

    input: str | None = setting(
        None,
        "input files: .txt (one text per line), .jsonl, .csv, each also .gz, .parquet, .arrow; also folders, saved "
        "datasets, glob patterns, or several separated by commas; -: standard input",
        path=True,
    )
    output: str | None = setting(None, "output directory for the embeddings and the manifest", path=True)
    field: str = setting("text", "key or column of the text")
    id_field: str | None = setting(None, "key or column of the id, for format=parquet; null: row number")
    stdin: str = setting("txt", "format of standard input", ("txt", "jsonl", "csv"))
    instruction: str = setting("", "instruction prepended to every text, separated by a space")
    by_teacher: bool = setting(
        False, "encode by the teacher in the model directory (teacher.keep): for documents, without an instruction"
    )
    batch_size: int = setting(
        32, "rows of 256 tokens per batch; short texts share a row. With by_teacher texts per batch", least=1
    )
    max_length: int = setting(512, "maximum tokens per text, including the compression tokens", least=1)
    truncate_dim: int | None = setting(None, "number of leading dimensions to keep; null: all", least=1)
    normalize: bool = setting(False, "L2-normalize embeddings, after truncate_dim")
    precision: str = setting("float32", "precision of the embeddings", ("float32", "float16", "int8", "binary"))
    format: str = setting("npy", "file format; parquet: columns id and vector", ("npy", "parquet"))
    shard_size: int = setting(10_000, "rows per file, and maximum number of embeddings in memory", least=1)
    save_soft_prompts: bool = setting(False, "also write soft_prompts-00000.npy ..., the input of `decode`")
    warmup: bool = setting(False, "compile all shapes before the first batch instead of on first use")
    dtype: str = setting("auto", DTYPE_HELP, BACKBONE_DTYPES)
    shard: ShardConfig = section(ShardConfig)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class DecodeConfig(ModelHubConfig):
    """`python -m launch.decode MODEL`: decode embeddings' soft prompts into text with the frozen LLM."""

    EXAMPLE: ClassVar = 'smollm2-135m text="What is the capital of France?"'

    text: str | None = setting(None, "single text to encode and decode")
    input: str | None = setting(None, ".txt, .jsonl, .csv or .parquet file of texts to encode and decode", path=True)
    soft_prompts: str | None = setting(
        None, "output folder of `encode save_soft_prompts=true`, or a .npy file (n, K, D) from it", path=True
    )
    output: str | None = setting(None, "output JSONL file; null: print", path=True)
    field: str = setting("text", "key or column of the text")
    batch_size: int = setting(16, "texts per batch", least=1)
    max_length: int = setting(512, "maximum tokens per text, including the compression tokens", least=1)
    max_new_tokens: int = setting(128, "maximum tokens per decoded text", least=1)
    temperature: float = setting(0.0, "sampling temperature; 0: greedy decoding")
    top_p: float = setting(1.0, "nucleus sampling probability", most=1)
    seed: int = setting(0, "sampling seed")
    dtype: str = setting("auto", DTYPE_HELP, BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class EvaluateConfig(ModelHubConfig):
    """`python -m launch.evaluate MODEL`: evaluate an embedder or a baseline on task folders, MTEB or BRIGHT."""

    REQUIRED: ClassVar = ("tasks", "output")
    EXAMPLE: ClassVar = "smollm2-135m tasks=tasks output=scores"

    tasks: str | None = setting(
        None,
        "folder of task folders, or hub tasks (mteb-eng-v2, mteb-lite, bright, or a task name); a,b: several",
        path=True,
    )
    output: str | None = setting(None, "output directory for results.json; repeat the command to resume", path=True)
    kind: str = setting(
        "student",
        "type of MODEL; student: embedder; teacher: backbone with mean pooling; hyde: backbone that embeds its own "
        "answers",
        ("student", "teacher", "hyde"),
    )
    adapters: list[str] = setting(
        [], "kind=teacher, hyde: PEFT LoRA folders or hub ids, merged into the embedding backbone", path=True
    )
    attention: str = setting(
        "auto",
        "kind=teacher, hyde: attention of the embedding backbone; auto: bidirectional with adapters, else causal",
        ("auto", "causal", "bidirectional"),
    )
    max_new_tokens: int = setting(256, "kind=hyde: maximum tokens per answer, decoded greedily", least=1)
    by_teacher: str = setting(
        "none",
        "kind=student: texts that the teacher in the model directory (teacher.keep) encodes, without an instruction; "
        "all: queries too",
        ("none", "documents", "all"),
    )
    limit: int | None = setting(None, "maximum number of queries or test rows per task folder; null: all", least=1)
    query_instruction: str | None = setting(
        None, "query instruction for all tasks; null: each task's instruction (kind=teacher: none)"
    )
    document_instruction: str | None = setting(
        None, "document instruction for all tasks; null: each task's instruction (kind=teacher, hyde: none)"
    )
    instructions: str | None = setting(
        None,
        "YAML file {query: {task name: text}, document: text} that overrides the published instructions",
        path=True,
    )
    save_scores: bool = setting(
        False,
        "kind=student: also save the main scores in MODEL, a model directory on this machine: in llm2vec_gen_jax.json, "
        "and in the model card README.md, which is regenerated",
    )
    batch_size: int = setting(32, "texts per batch", least=1)
    max_length: int | None = setting(None, "maximum tokens per text; null: as published (512; BRIGHT: 4096)", least=1)
    overwrite: bool = setting(False, "replace an output written with other settings")
    dtype: str = setting("auto", DTYPE_HELP, BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class FromPytorchConfig(ModelHubConfig):
    """`python -m launch.convert from_pytorch MODEL`: convert a published PyTorch model to a model directory."""

    REQUIRED: ClassVar = ("output",)
    EXAMPLE: ClassVar = "McGill-NLP/LLM2Vec-Gen-Qwen3-06B output=model"

    output: str | None = setting(None, "new model directory, also readable by PyTorch", path=True)
    backbone: str | None = setting(None, "path or hub id of the backbone; null: the one recorded in MODEL", path=True)
    dtype: str = setting("auto", "dtype in which to load the backbone", DTYPES)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class ToPytorchConfig(ModelHubConfig):
    """`python -m launch.convert to_pytorch MODEL`: convert a model or run directory for use in PyTorch."""

    EXAMPLE: ClassVar = "smollm2-135m output=model-pt"

    output: str | None = setting(None, "new model directory in the published layout", path=True)
    backbone_output: str | None = setting(
        None,
        "new folder for the backbone; null: OUTPUT-backbone if the backbone is a GGUF file, else not written",
        path=True,
    )
    merged: str | None = setting(
        None,
        "new folder for the encoder as a plain transformers model: LoRA merged, compression tokens in the embedding "
        "table",
        path=True,
    )
    torch_dtype: str = setting("auto", "dtype recorded for PyTorch; auto: unchanged", DTYPES)
    backbone: str | None = setting(None, "path or hub id of the backbone; null: the one recorded in MODEL", path=True)
    dtype: str = setting("auto", "dtype of the written backbone weights", DTYPES)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class VerifyConfig(ModelHubConfig):
    """`python -m launch.convert verify MODEL`: compare embeddings and decoded text in JAX and PyTorch.

    Exit code: 0 PASS, 1 FAIL, 2 not compared because PyTorch is missing.
    """

    EXAMPLE: ClassVar = "smollm2-135m python=PYTORCH_ENV/bin/python"

    python: str | None = setting(
        None,
        "Python interpreter of an environment with PyTorch, preferably with llm2vec-gen; null: the current one",
        path=True,
    )
    backbone: str | None = setting(None, "path or hub id of the backbone; null: the one recorded in MODEL", path=True)
    max_new_tokens: int = setting(16, "tokens decoded from each of two embeddings", least=1)
