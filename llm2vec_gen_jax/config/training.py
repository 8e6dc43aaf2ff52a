"""Settings of the commands that train, and of `plan`."""

import dataclasses
from typing import ClassVar

from llm2vec_gen_jax.config.common import (
    BackboneConfig,
    DistributedConfig,
    HubConfig,
    KernelsConfig,
    MeshConfig,
    section,
    setting,
)


@dataclasses.dataclass
class CompressionConfig:
    """The trainable tokens appended to a text."""

    num_tokens: int = setting(
        10, "number K of trainable compression tokens, whose last hidden states form the embedding", least=1
    )
    num_thought_tokens: int = setting(0, "number of extra trainable tokens before the K, whose states are not used")


@dataclasses.dataclass
class LoraConfig:
    """LoRA on the encoder pass; the decoder remains the frozen LLM."""

    rank: int = setting(0, "LoRA rank on all seven projections of the encoder pass; 0: no LoRA")
    alpha: float = setting(16.0, "LoRA scaling: updates are multiplied by alpha / rank")
    dropout: float = setting(0.05, "dropout rate of the LoRA inputs during training", most=0.99)


@dataclasses.dataclass
class TeacherConfig:
    """The teacher: its embedding of each response, computed once, is the alignment target."""

    kind: str = setting(
        "llm2vec",
        "type of teacher; llm2vec: backbone with merged adapters and mean pooling; sentence_transformers: any model "
        "of that library; file: precomputed targets",
        ("llm2vec", "sentence_transformers", "file"),
    )
    attention: str = setting(
        "auto",
        "kind=llm2vec: attention; auto: bidirectional with adapters, else causal",
        ("auto", "causal", "bidirectional"),
    )
    adapters: list[str] = setting([], "PEFT LoRA folders or hub ids, merged into the backbone in this order", path=True)
    path: str | None = setting(
        None,
        "kind=llm2vec: backbone, if not the student's; kind=sentence_transformers: folder or hub id; kind=file: .npy "
        "file of float targets (rows of data.responses, E)",
        path=True,
    )
    prompt: str | None = setting(
        None, "kind=sentence_transformers: prompt prepended to every answer; null: the model's document prompt"
    )
    normalize: bool = setting(False, "kind=sentence_transformers: L2-normalize targets")
    average: bool = setting(False, "average the targets of records with the same question (`respond samples=N`)")
    query_weight: float = setting(
        0.0, "weight of the vector of the query itself in each target, whose rest is that of the answer", most=1
    )
    centre: bool = setting(False, "subtract the mean of all targets from each target")
    whiten: float = setting(
        0.0, "degree of whitening of the targets, which also centers them; 0: none, 1: full whitening", most=1
    )
    batch_size: int = setting(32, "responses per teacher batch", least=1)
    keep: bool = setting(
        False,
        "kind=llm2vec: copy adapters and whitening to the model directory, so that documents can be encoded by "
        "the teacher",
    )


@dataclasses.dataclass
class DataConfig:
    """The training data: source, truncation and order."""

    responses: str | None = setting(
        None, ".jsonl, .csv or .parquet file with question and answer, or a Hugging Face dataset id", path=True
    )
    split: str = setting("train", "split of a Hugging Face dataset")
    finished_only: bool = setting(False, "skip truncated responses (`finish: length` in the output of `respond`)")
    max_query_length: int = setting(512, "maximum tokens per query, including the compression tokens", least=1)
    max_answer_length: int = setting(512, "maximum tokens per answer, including the end token", least=1)
    answer_suffix: str = setting(
        "auto",
        "text appended to every answer; auto: the tokenizer's end token; <|end_of_text|>: as published",
    )
    shuffle: bool = setting(True, "shuffle the examples every epoch")
    seed: int = setting(0, "shuffling seed")
    max_buckets: int = setting(
        8, "maximum number of padded lengths to compile, for queries and for answers each", least=1
    )


@dataclasses.dataclass
class LossConfig:
    """Loss weights; losses with weight 0 are not computed."""

    reconstruction: float = setting(1.0, "weight of the reconstruction loss")
    alignment: float = setting(1.0, "weight of the alignment loss")
    alignment_function: str = setting(
        "mse", "function of the alignment losses; mse: as published; cosine: 1 - cosine similarity", ("mse", "cosine")
    )
    repeat: float = setting(
        0.0, "weight, relative to loss.alignment, of aligning a request to repeat the answer with its target"
    )
    repeat_instructions: str | None = setting(
        None, "file of such requests, a line each, used in turn; null: the published one", path=True
    )
    negative: float = setting(
        0.0, "weight, relative to loss.alignment, of aligning negative_question with negative_answer"
    )
    margin: float = setting(0.0, "weight of the margin loss between questions, and against negative_question")
    margin_threshold: float = setting(10.0, "distance above which the margin loss is zero")
    contrastive: float = setting(0.0, "weight of the contrastive loss between questions and repeated answers")
    contrastive_function: str = setting("cosine", "similarity of the contrastive loss", ("cosine", "dot_product"))
    contrastive_scale: float = setting(20.0, "scale of the contrastive similarities (inverse temperature)")
    contrastive_hardness: float = setting(
        0.0, "hardness alpha of the contrastive loss: hard negatives are weighted by exp(alpha * similarity)"
    )
    chunk_tokens: int | None = setting(
        None, "answer tokens per chunk of logits; null: chosen from the device memory", least=1
    )


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW, its learning rate schedule and gradient clipping."""

    learning_rate: float = setting(5e-4, "peak learning rate of AdamW")
    head_learning_rate: float | None = setting(
        None, "peak learning rate of the two heads; null: learning_rate; 0: the heads are not trained"
    )
    schedule: str = setting("linear", "learning rate schedule after warm-up", ("linear", "constant", "cosine"))
    schedule_steps: int = setting(20_000, "steps after which a linear or cosine schedule reaches zero", least=1)
    warmup_steps: int = setting(100, "steps of linear warm-up")
    weight_decay: float = setting(0.0, "weight decay of AdamW")
    max_grad_norm: float = setting(1.0, "maximum global gradient norm (clipping); 0: no clipping")


@dataclasses.dataclass
class RunSettings:
    """Settings shared by all training runs."""

    output: str | None = setting(None, "run directory; an interrupted run in it is resumed", path=True)
    overwrite: bool = setting(False, "delete the contents of the run directory first")
    log_every: int = setting(10, "steps between records in metrics.jsonl", least=1)
    checkpoint_minutes: float = setting(
        10.0, "minutes between checkpoints, in addition to checkpoint_every; 0: by steps only"
    )
    keep_checkpoints: int = setting(2, "number of most recent checkpoints to keep", least=1)
    watchdog: int = setting(1800, "seconds without a completed step after which the run exits with code 76", least=1)
    remat: str = setting(
        "auto",
        "rematerialization policy, activations saved per layer; none: all; dots: matrix products; block: layer input; "
        "auto: dots if it fits in device memory, else block",
        ("auto", "none", "dots", "block"),
    )


@dataclasses.dataclass
class TrainSettings(RunSettings):
    """The training run: length, batch size, run directory and checkpoints."""

    checkpoint_every: int = setting(500, "steps between checkpoints", least=1)
    steps: int = setting(5_000, "number of optimizer steps; 0: only solve the alignment head (ridge_examples)")
    batch_size: int = setting(32, "global batch size", least=1)
    microbatches: int = setting(
        1,
        "parts of a batch that are computed one after the other (gradient accumulation): less memory, and the same "
        "result up to rounding",
        least=1,
    )
    seed: int = setting(42, "seed for initializing the trainable parameters")
    init_from: str | None = setting(None, "model directory from which to initialize tokens, heads and LoRA", path=True)
    ridge_examples: int = setting(
        0,
        "number of examples on which the alignment head is solved by ridge regression before the first step; 0: off, "
        "as published",
    )
    ridge_every: int = setting(0, "steps after each of which the alignment head is solved again; 0: never")
    profile: str | None = setting(None, "START:STOP: steps to profile; the TensorBoard trace is written to profile/")


@dataclasses.dataclass
class ValidationConfig:
    """Evaluation during training, of held-out records and task folders; off without either."""

    responses: str | None = setting(
        None, "held-out records, as data.responses, on which all losses are computed", path=True
    )
    tasks: str | None = setting(
        None,
        "folder of task folders, or hub tasks, as for `evaluate` (pip install -r requirements-eval.txt)",
        path=True,
    )
    limit: int | None = setting(None, "maximum number of queries or test rows per task folder; null: all", least=1)
    every: int = setting(500, "steps between evaluations; the last step is always evaluated", least=1)
    metric: str | None = setting(
        None,
        "value that decides which step is best: loss, reconstruction_loss, alignment_loss, tasks (mean of the main "
        "scores) or the name of a task; null: loss, or tasks without validation.responses",
    )
    keep_best: bool = setting(True, "write the model of the best step; false: of the last step")
    patience: int = setting(0, "evaluations without a new best step after which training ends; 0: off")


@dataclasses.dataclass
class TrackingConfig:
    """Settings shared by all commands that train."""

    tracking: str | None = setting(
        None,
        "experiment tracker, in addition to metrics.jsonl and TensorBoard (pip install -r requirements-tracking.txt)",
        ("wandb", "trackio"),
    )


@dataclasses.dataclass
class TrainConfig(TrackingConfig, HubConfig, DistributedConfig):
    """`python -m launch.train`: train compression tokens and heads on responses."""

    REQUIRED: ClassVar = ("data.responses", "train.output")
    EXAMPLE: ClassVar = "data.responses=responses.jsonl train.output=runs/demo train.steps=100"

    backbone: BackboneConfig = section(BackboneConfig)
    compression: CompressionConfig = section(CompressionConfig)
    lora: LoraConfig = section(LoraConfig)
    teacher: TeacherConfig = section(TeacherConfig)
    data: DataConfig = section(DataConfig)
    loss: LossConfig = section(LossConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainSettings = section(TrainSettings)
    validation: ValidationConfig = section(ValidationConfig)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class AblateConfig(TrainConfig):
    """`python -m launch.ablate`: train one run per config, in train.output/NAME, and print a table of the results."""

    EXAMPLE: ClassVar = "configs/ablations/tokens-*.yaml data.responses=responses.jsonl train.output=runs/tokens"


@dataclasses.dataclass
class PlanConfig(HubConfig):
    """`python -m launch.plan`: estimate the cost of training and inference on devices that need not be attached.

    Compiles a training step, an encoding pass and the generation of a batch of answers for a mesh, without running
    them. Prints bytes per device, FLOPs, bytes moved by collectives, and a lower bound on the time from the devices'
    data sheets. TPUs need the TPU compiler (pip install libtpu), NVIDIA GPUs the GPU compiler
    (requirements-gpu-compiler.txt); without the latter, the CPU compiler estimates GPU memory, and the programs are
    only lowered for CUDA. A program fits if it needs less than 92 % of the memory available to JAX: on GPUs 75 % of the
    device memory, or XLA_PYTHON_CLIENT_MEM_FRACTION.

    topology= is for TPUs v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1; for GPUs h100 (one), h100:8 (one host),
    h100:2x8 (two) with a100, a100-40gb, a10g, b200, gb200, gh200, h100, h100-nvl, h100-pcie, h200, l4, l40s, t4; cpu:4;
    null: the attached devices.
    """

    EXAMPLE: ClassVar = "configs/qwen3-0.6b.yaml architecture=configs/architectures/qwen3-0.6b.json topology=v5e:4x4"

    topology: str | None = setting(None, "device topology, as listed above")
    architecture: str | None = setting(
        None,
        "config.json of a backbone without weights (configs/architectures/); null: that of backbone.path",
        path=True,
    )
    answer_length: int = setting(512, "tokens per answer", least=1)
    query_length: int = setting(512, "tokens per query, and per row of texts to encode", least=1)
    search: bool = setting(False, "try meshes and remat policies, cheapest first, until one fits")
    measure: bool = setting(
        False, "also run the programs on random weights, and print measured next to estimated peak memory"
    )
    output: str | None = setting(None, "JSONL file to append every result to", path=True)
    backbone: BackboneConfig = section(BackboneConfig)
    compression: CompressionConfig = section(CompressionConfig)
    lora: LoraConfig = section(LoraConfig)
    loss: LossConfig = section(LossConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainSettings = section(TrainSettings)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class CorpusConfig:
    """The texts on which a teacher is trained."""

    path: str | None = setting(
        None,
        ".txt (one text per line), .jsonl, .csv or .parquet file; null: generate responses with the backbone",
        path=True,
    )
    field: str = setting("answer", "key or column of the text")
    sentences: bool = setting(True, "train SimCSE on sentences; false: on full texts")
    queries: int = setting(5000, "without corpus.path: number of queries to generate and respond to", least=1)
    max_new_tokens: int = setting(256, "without corpus.path: maximum tokens per response", least=1)


@dataclasses.dataclass
class StageConfig:
    """Settings shared by both stages of teacher training."""

    steps: int = setting(1000, "number of optimizer steps; 0: skip this stage")
    warmup_steps: int = setting(0, "steps of linear warm-up")
    schedule_steps: int | None = setting(
        None, "steps after which the learning rate reaches zero; null: same as steps", least=1
    )
    rank: int = setting(16, "LoRA rank on all seven projections", least=1)
    alpha: float = setting(32.0, "LoRA scaling: updates are multiplied by alpha / rank")
    dropout: float = setting(0.05, "dropout rate of the LoRA inputs", most=0.99)


@dataclasses.dataclass
class MntpConfig(StageConfig):
    """First stage: masked next-token prediction (LLM2Vec, BehnamGhader et al. 2024)."""

    learning_rate: float = setting(5e-5, "peak learning rate of AdamW")
    batch_size: int = setting(32, "blocks per step", least=1)
    max_length: int = setting(512, "tokens per block", least=2)
    mask_probability: float = setting(0.2, "fraction of tokens to predict")
    mask_token: str = setting("_", "text of the mask token, a single token of the backbone")
    masking: str = setting(
        "bert", "masking scheme; bert: 80 % masked, 10 % random, 10 % unchanged; all: all masked", ("bert", "all")
    )


@dataclasses.dataclass
class SimcseConfig(StageConfig):
    """Second stage: unsupervised SimCSE, with two passes per text that differ in dropout."""

    learning_rate: float = setting(3e-5, "peak learning rate of AdamW")
    batch_size: int = setting(128, "texts per step, which are in-batch negatives of each other", least=2)
    max_length: int = setting(128, "maximum tokens per text", least=1)
    scale: float = setting(20.0, "scale of the cosine similarities (inverse temperature)")
    attention_dropout: float = setting(0.3, "dropout rate of the attention weights", most=0.99)


@dataclasses.dataclass
class TeacherSettings(RunSettings):
    """The teacher's training run."""

    checkpoint_every: int = setting(100, "steps between checkpoints", least=1)
    seed: int = setting(42, "random seed")
    adapter_dtype: str = setting("float32", "dtype of the written adapters", ("float32", "bfloat16"))


@dataclasses.dataclass
class TeacherTrainConfig(TrackingConfig, HubConfig, DistributedConfig):
    """`python -m launch.train_teacher`: train an unsupervised teacher for a backbone: MNTP, then SimCSE (LLM2Vec)."""

    REQUIRED: ClassVar = ("train.output",)
    EXAMPLE: ClassVar = "corpus.path=texts.txt train.output=runs/teacher"

    backbone: BackboneConfig = section(BackboneConfig)
    attention: str = setting(
        "bidirectional", "attention of both stages and of the resulting teacher", ("bidirectional", "causal")
    )
    corpus: CorpusConfig = section(CorpusConfig)
    mntp: MntpConfig = section(MntpConfig)
    simcse: SimcseConfig = section(SimcseConfig)
    train: TeacherSettings = section(TeacherSettings)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class QuickstartConfig(TrackingConfig, HubConfig):
    """`python -m launch.quickstart`: run the complete recipe at a small scale, from the default backbone alone."""

    EXAMPLE: ClassVar = "output=runs/quickstart"

    backbone: BackboneConfig = section(BackboneConfig)
    output: str = setting("runs/quickstart", "output directory; repeat the command to resume", path=True)
    queries: int = setting(240, "number of queries to generate", least=1)
    max_new_tokens: int = setting(64, "maximum tokens per response", least=1)
    steps: int = setting(160, "number of training steps", least=1)
    batch_size: int = setting(8, "training batch size", least=1)
    learning_rate: float = setting(1e-3, "peak learning rate; high because the run is short")
    seed: int = setting(0, "random seed")
    overwrite: bool = setting(False, "replace an output written with other settings")
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)
