"""The settings of everything that trains, and of what plans it."""

import dataclasses

from llm2vec_gen_jax.config.common import (
    BackboneConfig,
    DistributedConfig,
    KernelsConfig,
    MeshConfig,
    section,
    setting,
)


@dataclasses.dataclass
class CompressionConfig:
    """The trainable tokens that follow a text."""

    num_tokens: int = setting(
        10, "trainable compression tokens K whose last hidden states become the embedding", least=1
    )
    num_thought_tokens: int = setting(0, "extra trainable tokens before the K, computed and not read")


@dataclasses.dataclass
class LoraConfig:
    """A LoRA on the encoder's pass; the decoder stays the frozen LLM."""

    rank: int = setting(0, "of the low-rank updates on the encoder's pass (all seven projections); 0: none")
    alpha: float = setting(16.0, "the updates are scaled by alpha / rank")
    dropout: float = setting(0.05, "of the updates' inputs while they train", most=0.99)


@dataclasses.dataclass
class TeacherConfig:
    """What gives the alignment targets: the vector of every response, computed once."""

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
    adapters: list[str] = setting([], "PEFT LoRA folders or hub ids, merged into the backbone in this order", path=True)
    path: str | None = setting(
        None,
        "kind=llm2vec: another backbone than the student's; kind=sentence_transformers: a folder or hub id; "
        "kind=file: a .npy of float targets (rows of data.responses, E)",
        path=True,
    )
    prompt: str | None = setting(
        None, "kind=sentence_transformers: put before every answer; null: the model's own for documents"
    )
    normalize: bool = setting(False, "kind=sentence_transformers: targets of unit length")
    average: bool = setting(False, "records of one question share the mean of their targets (`respond samples=N`)")
    centre: bool = setting(False, "the mean of all targets is taken out of each")
    whiten: float = setting(
        0.0, "centre, and even out the variance of the targets' directions: 1 wholly, 0 not at all", most=1
    )
    batch_size: int = setting(32, "responses per teacher pass", least=1)


@dataclasses.dataclass
class DataConfig:
    """What is trained on, and how it is cut and ordered."""

    responses: str | None = setting(None, "JSONL[.gz] of {question, answer}, or a Hugging Face dataset id", path=True)
    split: str = setting("train", "split of a Hugging Face dataset")
    finished_only: bool = setting(False, "leave out responses that were cut (`finish: length`, as `respond` writes it)")
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
    """The weights of the losses; what has weight 0 is neither read nor computed."""

    reconstruction: float = setting(1.0, "weight of the reconstruction loss")
    alignment: float = setting(1.0, "weight of the alignment loss")
    alignment_function: str = setting(
        "mse", "of the alignment losses: mean squared error (as published), or 1 - cosine", ("mse", "cosine")
    )
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
    chunk_tokens: int | None = setting(
        None, "answer tokens whose logits are in memory at a time; null: by the device's memory", least=1
    )


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW, its schedule and clipping."""

    learning_rate: float = setting(5e-4, "peak learning rate of AdamW")
    schedule: str = setting("linear", "after the warm-up", ("linear", "constant", "cosine"))
    schedule_steps: int = setting(20_000, "steps after which a linear or cosine schedule reaches zero", least=1)
    warmup_steps: int = setting(100, "steps of linear warm-up")
    weight_decay: float = setting(0.0, "of AdamW")
    max_grad_norm: float = setting(1.0, "global norm to which gradients are clipped; 0: no clipping")


@dataclasses.dataclass
class RunSettings:
    """What every run directory takes."""

    output: str | None = setting(None, "run directory; an interrupted run in it is resumed", path=True)
    overwrite: bool = setting(False, "delete what is in the run directory first")
    log_every: int = setting(10, "steps between records in metrics.jsonl", least=1)
    checkpoint_minutes: float = setting(10.0, "minutes after which a checkpoint is saved besides; 0: by steps alone")
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept", least=1)
    watchdog: int = setting(1800, "seconds without a finished step after which a run gives up (exit code 76)", least=1)
    remat: str = setting(
        "auto",
        "what the backward pass keeps of a layer: everything, its matrix products, or its input only; auto: dots if it "
        "fits in the device's memory, else block",
        ("auto", "none", "dots", "block"),
    )


@dataclasses.dataclass
class TrainSettings(RunSettings):
    """The run: how long, how large, where it is kept, and what its backward pass keeps."""

    checkpoint_every: int = setting(500, "steps between checkpoints", least=1)
    steps: int = setting(5_000, "optimizer steps", least=1)
    batch_size: int = setting(32, "global batch size", least=1)
    seed: int = setting(42, "of the initial trainable parameters")
    init_from: str | None = setting(None, "model directory whose tokens and heads are the start", path=True)
    ridge_examples: int = setting(
        0,
        "examples on which ridge regression solves the alignment head before the first step; 0: none, as published",
    )
    profile: str | None = setting(None, "START:STOP: steps of which a trace for TensorBoard is written to profile/")


@dataclasses.dataclass
class TrackingConfig:
    """What every training takes."""

    tracking: str | None = setting(
        None,
        "where to log beside metrics.jsonl and TensorBoard (pip install -r requirements-tracking.txt)",
        ("wandb", "trackio"),
    )


@dataclasses.dataclass
class TrainConfig(TrackingConfig, DistributedConfig):
    """`python -m launch.train`: train compression tokens and heads on responses."""

    backbone: BackboneConfig = section(BackboneConfig)
    compression: CompressionConfig = section(CompressionConfig)
    lora: LoraConfig = section(LoraConfig)
    teacher: TeacherConfig = section(TeacherConfig)
    data: DataConfig = section(DataConfig)
    loss: LossConfig = section(LossConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainSettings = section(TrainSettings)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class AblateConfig(TrainConfig):
    """`python -m launch.ablate`: train several configs, each into train.output/NAME, and print one table of them."""


@dataclasses.dataclass
class PlanConfig:
    """`python -m launch.plan`: what a training step and an encoding pass cost on devices that need not be here.

    Compiles both, and the generation of a batch of answers, for a mesh; runs nothing, and prints bytes per device,
    FLOPs, bytes that collectives move, and the time that these need at least by the data sheets of the devices. TPUs
    need the TPU compiler (pip install libtpu), NVIDIA GPUs the GPU compiler (requirements-gpu-compiler.txt); without
    it they are estimated by the CPU compiler, and lowered for CUDA. What fits is below 92 % of what JAX lets a program
    have: on a GPU 75 % of its memory, or XLA_PYTHON_CLIENT_MEM_FRACTION.

    topology=   v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1; h100 (one), h100:8 (one host), h100:2x8 (two):
                a100, a100-40gb, a10g, b200, gb200, gh200, h100, h100-nvl, h100-pcie, h200, l4, l40s, t4;
                cpu:4; null: the devices here
    """

    topology: str | None = setting(None, "devices, as above")
    architecture: str | None = setting(
        None,
        "config.json of a backbone that is not here (configs/architectures/); null: that of backbone.path",
        path=True,
    )
    answer_length: int = setting(512, "tokens of every answer", least=1)
    query_length: int = setting(512, "tokens of every query, and of a row of texts to encode", least=1)
    search: bool = setting(False, "try meshes and remat policies, cheapest first, until one fits")
    measure: bool = setting(False, "run both here, on random weights, and print the measured peak beside the estimate")
    output: str | None = setting(None, "JSONL to which every row is appended", path=True)
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
    """The texts that a teacher is trained on."""

    path: str | None = setting(
        None, "a .txt (a text per line) or .jsonl[.gz]; default: the backbone's own responses", path=True
    )
    field: str = setting("answer", "of the JSONL objects")
    sentences: bool = setting(True, "SimCSE reads the texts' sentences, not whole texts")
    queries: int = setting(5000, "without corpus.path: queries that the backbone writes and responds to", least=1)
    max_new_tokens: int = setting(256, "without corpus.path: tokens of a response", least=1)


@dataclasses.dataclass
class StageConfig:
    """What both stages of a teacher's training take."""

    steps: int = setting(1000, "optimizer steps; 0: leave this stage out")
    warmup_steps: int = setting(0, "steps of linear warm-up")
    schedule_steps: int | None = setting(None, "steps after which the rate is zero; default: steps", least=1)
    rank: int = setting(16, "of the LoRA on all seven projections", least=1)
    alpha: float = setting(32.0, "the LoRA is scaled by alpha / rank")
    dropout: float = setting(0.05, "of the LoRA's inputs", most=0.99)


@dataclasses.dataclass
class MntpConfig(StageConfig):
    """Masked next-token prediction, a teacher's first stage (LLM2Vec, BehnamGhader et al. 2024)."""

    learning_rate: float = setting(5e-5, "peak learning rate of AdamW")
    batch_size: int = setting(32, "blocks per step", least=1)
    max_length: int = setting(512, "tokens of a block", least=2)
    mask_probability: float = setting(0.2, "share of tokens that are predicted")
    mask_token: str = setting("_", "what hides a token; one token of the backbone")
    masking: str = setting("bert", "bert: 80 % masked, 10 % random, 10 % kept; all: all masked", ("bert", "all"))


@dataclasses.dataclass
class SimcseConfig(StageConfig):
    """Unsupervised SimCSE, a teacher's second stage: two passes of a text with different dropout."""

    learning_rate: float = setting(3e-5, "peak learning rate of AdamW")
    batch_size: int = setting(128, "texts per step; each is every other's negative", least=2)
    max_length: int = setting(128, "tokens of a text", least=1)
    scale: float = setting(20.0, "of the cosines (inverse temperature)")
    attention_dropout: float = setting(0.3, "of the attention weights: what makes two passes differ", most=0.99)


@dataclasses.dataclass
class TeacherSettings(RunSettings):
    """The run of a teacher's training."""

    checkpoint_every: int = setting(100, "steps between checkpoints", least=1)
    seed: int = setting(42, "of everything")
    adapter_dtype: str = setting("float32", "of the written adapters", ("float32", "bfloat16"))


@dataclasses.dataclass
class TeacherTrainConfig(TrackingConfig, DistributedConfig):
    """`python -m launch.train_teacher`: an unsupervised teacher for a backbone: MNTP, then SimCSE (LLM2Vec)."""

    backbone: BackboneConfig = section(BackboneConfig)
    attention: str = setting(
        "bidirectional", "of both stages, and of the teacher that they make", ("bidirectional", "causal")
    )
    corpus: CorpusConfig = section(CorpusConfig)
    mntp: MntpConfig = section(MntpConfig)
    simcse: SimcseConfig = section(SimcseConfig)
    train: TeacherSettings = section(TeacherSettings)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)


@dataclasses.dataclass
class QuickstartConfig(TrackingConfig):
    """`python -m launch.quickstart`: the whole recipe, small, from nothing but the default backbone."""

    backbone: BackboneConfig = section(BackboneConfig)
    output: str = setting("runs/quickstart", "directory for everything; repeat the command to resume", path=True)
    queries: int = setting(240, "queries that the LLM writes", least=1)
    max_new_tokens: int = setting(64, "tokens of a response", least=1)
    steps: int = setting(160, "training steps", least=1)
    batch_size: int = setting(8, "training batch", least=1)
    learning_rate: float = setting(1e-3, "peak; high, because the run is short")
    seed: int = setting(0, "of everything")
    overwrite: bool = setting(False, "start anew")
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)
