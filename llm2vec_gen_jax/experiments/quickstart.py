"""The complete recipe at a small size: queries, responses, targets, training, a model directory and a report."""

import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import entries, require_written
from llm2vec_gen_jax.common.jsonl import read_jsonl
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.inference.respond import load_configured_backbone, respond
from llm2vec_gen_jax.inference.synthesize import synthesize
from llm2vec_gen_jax.pretrained import default_backbone
from llm2vec_gen_jax.pretrained.backbone import TEACHERS
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.train import train

# For the report; not part of any training data.
QUESTIONS = (
    "What is the capital of France?",
    "How do I make bread rise?",
    "Write a Python function that adds two numbers.",
    "Why is exercise good for your health?",
)
ANSWERS = (
    "The capital of France is Paris, a city on the river Seine.",
    "Use fresh yeast and warm water, knead the dough well and let it rest in a warm place for an hour.",
    "Here is a Python function:\n\ndef add(a, b):\n    return a + b",
    "Regular exercise strengthens your heart and muscles, improves your mood and helps you sleep.",
)


def quickstart(config: config_lib.QuickstartConfig) -> pathlib.Path:
    """Runs (or resumes) the recipe of a QuickstartConfig and prints a report. Returns the model directory."""
    options.require(config)
    with locks.locked(config.output, "output"):
        return _quickstart(config)


def _quickstart(config: config_lib.QuickstartConfig) -> pathlib.Path:
    output = pathlib.Path(config.output)
    if config.overwrite and output.exists():
        if not (output / "queries.jsonl").exists() and entries(output):
            raise InputError(
                f"output={output}: was not written by quickstart and is not deleted. Choose another output"
            )
        shutil.rmtree(output)
    common: dict[str, Any] = {
        "backbone": config.backbone,
        "kernels": config.kernels,
        "mesh": config.mesh,
        "seed": config.seed,
    }
    print(f"1/4  generating {config.queries} queries with {config.backbone.path}", flush=True)
    backbone = load_configured_backbone(config)
    queries = synthesize(
        config_lib.SynthesizeConfig(
            **common, output=str(output / "queries.jsonl"), count=config.queries, max_new_tokens=64
        ),
        backbone,
    )
    print("2/4  generating responses", flush=True)
    responses = respond(
        config_lib.RespondConfig(
            **common,
            input=str(queries),
            output=str(output / "responses.jsonl"),
            max_new_tokens=config.max_new_tokens,
        ),
        backbone,
    )
    teacher = "the shipped teacher" if _teacher_adapters(config) else "the backbone"
    print(f"3/4  training compression tokens and heads on targets of {teacher}", flush=True)
    model_directory = train(_train_config(config, responses), backbone=backbone)
    print("4/4  report\n", flush=True)
    model = LLM2VecGen.from_pretrained(
        model_directory, config.backbone.dtype, mesh=config.mesh, attention=config.kernels.attention
    )
    require_written(queries, responses, model_directory)
    print(report(model, model_directory.parent, responses))
    print(_written_paths(output, queries, responses, model_directory))
    return model_directory


def _teacher_adapters(config: config_lib.QuickstartConfig) -> list[str]:
    """Returns the teacher's adapters: the shipped ones of the default backbone, none for other backbones."""
    return list(TEACHERS) if config.backbone.path == default_backbone.NAME else []


def _train_config(config: config_lib.QuickstartConfig, responses: pathlib.Path) -> config_lib.TrainConfig:
    return config_lib.TrainConfig(
        tracking=config.tracking,
        backbone=config.backbone,
        teacher=config_lib.TeacherConfig(adapters=_teacher_adapters(config)),
        kernels=config.kernels,
        mesh=config.mesh,
        data=config_lib.DataConfig(responses=str(responses), seed=config.seed),
        optimizer=config_lib.OptimizerConfig(
            learning_rate=config.learning_rate, schedule_steps=config.steps, warmup_steps=config.steps // 10
        ),
        train=config_lib.TrainSettings(
            steps=config.steps,
            batch_size=config.batch_size,
            seed=config.seed,
            log_every=max(config.steps // 15, 1),
            checkpoint_every=max(config.steps // 4, 1),
            output=str(pathlib.Path(config.output) / "run"),
        ),
    )


def report(model: LLM2VecGen, run: pathlib.Path, responses: pathlib.Path) -> str:
    """Returns the report: loss curve, cosines of questions and answers, decoded embeddings."""
    parts = ["loss", loss_curve(read_metrics(run)), "", cosine_table(model), "", "text decoded from two embeddings"]
    rows = [row for _, row in read_jsonl(responses)][:2]
    _, soft_prompts = model.encode([row["question"] for row in rows], return_soft_prompts=True)
    for row, decoded in zip(rows, model.decode(soft_prompts, max_new_tokens=40)):
        parts += [
            f"  question: {_short(row['question'])}",
            f"  response: {_short(row['answer'])}",
            f"  decoded:  {_short(decoded)}",
            "",
        ]
    return "\n".join(parts)


def loss_curve(records: Sequence[Mapping[str, Any]], width: int = 48) -> str:
    """Returns one line per record: step, losses, and a bar whose length is proportional to the loss."""
    top = max(record["loss"] for record in records)
    lines = [f"  {'step':>6} {'loss':>8} {'reconstruction':>15} {'alignment':>10}"]
    for record in records:
        losses = f"{record['loss']:8.3f} {record['reconstruction_loss']:15.3f} {record['alignment_loss']:10.3f}"
        lines.append(f"  {record['step']:>6} {losses}  {'█' * round(record['loss'] / top * width)}")
    return "\n".join(lines)


def cosine_table(model: LLM2VecGen) -> str:
    """Returns the cosines between the centered embeddings of QUESTIONS and ANSWERS."""
    embeddings = model.encode([*QUESTIONS, *ANSWERS])
    # Embeddings of one LLM have a large common component, which would dominate the cosines.
    embeddings = embeddings - embeddings.mean(axis=0)
    cosines = model.similarity(embeddings[: len(QUESTIONS)], embeddings[len(QUESTIONS) :])
    hits = int(np.sum(cosines.argmax(axis=1) == np.arange(len(QUESTIONS))))
    lines = ["cosine of questions (rows) and answers (columns), centered", " " * 52 + "a1     a2     a3     a4"]
    for question, row in zip(QUESTIONS, cosines):
        cells = "  ".join(f"{value:5.2f}" for value in row)
        lines.append(f"  {_short(question, 46):<47} {cells}")
    return "\n".join([*lines, f"  nearest answer is the right one: {hits} of {len(QUESTIONS)}"])


def _written_paths(
    output: pathlib.Path, queries: pathlib.Path, responses: pathlib.Path, model_directory: pathlib.Path
) -> str:
    return "\n".join(
        [
            f"written to {output}",
            f"  queries    {queries}",
            f"  responses  {responses}",
            f"  metrics    {model_directory.parent / 'metrics.jsonl'} (and tensorboard/)",
            f"  model      {model_directory}",
            f"next: python -m launch.encode {model_directory} input=FILE.txt output=vectors",
            f"      python -m launch.convert verify {model_directory}    (with PyTorch installed)",
        ]
    )


def _short(text: str, length: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
