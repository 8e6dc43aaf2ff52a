"""The complete recipe at a small size: queries, responses, targets, training, a model directory and a report."""

import pathlib
import shutil
import timeit
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import entries, require_written
from llm2vec_gen_jax.common.jsonl import read_jsonl
from llm2vec_gen_jax.common.terminal import command_prefix, shorten, terminal_width, wrap
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.inference.respond import load_configured_backbone, respond
from llm2vec_gen_jax.inference.synthesize import synthesize
from llm2vec_gen_jax.pretrained import default_backbone
from llm2vec_gen_jax.pretrained.backbone import TEACHERS, LoadedBackbone
from llm2vec_gen_jax.training import tracking
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.train import train

_QUERY_TOKENS = 64  # maximum tokens of a generated query
# Seconds per token and parameter, and for compilation, on a machine on which the product of _product_seconds takes
# _PRODUCT seconds. Measured on two cores with AVX-512, with the default backbone.
_GENERATED, _TRAINED, _COMPILATION, _PRODUCT = 4.5e-11, 2e-11, 30, 7e-3

# Beginnings of the names in an output folder; report.html is written by the command that the report ends with.
_WRITTEN = ("queries.jsonl", "responses.jsonl", "run", "report.html", ".")

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
    tracking.check(config.tracking)
    if config.queries < config.batch_size:
        raise InputError(f"queries={config.queries}: too few for batches of {config.batch_size} (batch_size)")
    with locks.locked(config.output, "output"):
        return _quickstart(config)


def _quickstart(config: config_lib.QuickstartConfig) -> pathlib.Path:
    output = pathlib.Path(config.output)
    if config.overwrite and output.exists():
        others = [name for name in entries(output) if not name.startswith(_WRITTEN)]
        if others or (entries(output) and not (output / "queries.jsonl.run.json").exists()):
            found = f" (found {others[0]})" if others else ""
            raise InputError(
                f"output={output}: was not written by quickstart{found} and is not deleted. Choose another output"
            )
        shutil.rmtree(output)
    common: dict[str, Any] = {
        "backbone": config.backbone,
        "kernels": config.kernels,
        "mesh": config.mesh,
        "seed": config.seed,
        **config_lib.hub_access(config),
    }
    backbone = load_configured_backbone(config)  # downloads the default one
    for line in wrap(_duration(config, backbone), terminal_width()):
        print(line)
    print(f"\n1/4  generating {config.queries} queries with {config.backbone.path}", flush=True)
    queries = synthesize(
        config_lib.SynthesizeConfig(
            **common, output=str(output / "queries.jsonl"), count=config.queries, max_new_tokens=_QUERY_TOKENS
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
        model_directory,
        config.backbone.dtype,
        mesh=config.mesh,
        attention=config.kernels.attention,
        **config_lib.hub_access(config),
    )
    require_written(queries, responses, model_directory)
    print(report(model, model_directory.parent, responses))
    print(_written_paths(output, queries, responses, model_directory))
    return model_directory


def _duration(config: config_lib.QuickstartConfig, backbone: LoadedBackbone) -> str:
    """Returns a sentence about the expected duration, proportional to tokens, parameters and cores."""
    resume = "Ctrl-C stops; the same command resumes"
    device = backbone.mesh.devices.flat[0]
    if device.platform != "cpu":
        return f"four stages, some minutes on {device.device_kind}, mostly compilation. {resume}"
    generated = config.queries * (_QUERY_TOKENS + config.max_new_tokens)
    trained = config.steps * config.batch_size * (_QUERY_TOKENS + config.max_new_tokens)
    work = backbone.architecture.num_parameters * (_GENERATED * generated + _TRAINED * trained)
    minutes = max(round((work + _COMPILATION) * _product_seconds() / _PRODUCT / 60), 1)
    return f"four stages, about {minutes} min on this CPU if it is otherwise idle. {resume}"


def _product_seconds() -> float:
    """Measures a float32 product of matrices on all cores, in half a second or less."""
    matrix = np.ones((1024, 1024), np.float32)
    return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=8))


def _teacher_adapters(config: config_lib.QuickstartConfig) -> list[str]:
    """Returns the teacher's adapters: the shipped ones of the default backbone, none for other backbones."""
    return list(TEACHERS) if config.backbone.path == default_backbone.NAME else []


def _train_config(config: config_lib.QuickstartConfig, responses: pathlib.Path) -> config_lib.TrainConfig:
    return config_lib.TrainConfig(
        tracking=config.tracking,
        **config_lib.hub_access(config),
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
    width = terminal_width()
    parts = ["loss", loss_curve(read_metrics(run), width), "", cosine_table(model, width), ""]
    parts.append("text decoded from two embeddings; readable text needs longer training")
    rows = [row for _, row in read_jsonl(responses)][:2]
    _, soft_prompts = model.encode([row["question"] for row in rows], return_soft_prompts=True)
    for row, decoded in zip(rows, model.decode(soft_prompts, max_new_tokens=40)):
        parts += [
            f"  question: {shorten(row['question'], width - 12)}",
            f"  response: {shorten(row['answer'], width - 12)}",
            f"  decoded:  {shorten(decoded, width - 12)}",
            "",
        ]
    return "\n".join(parts)


def loss_curve(records: Sequence[Mapping[str, Any]], width: int = 80) -> str:
    """Returns one line per record: step, losses, and a bar whose length is proportional to the loss."""
    longest = width - 46
    top = max(record["loss"] for record in records)
    lines = [f"  {'step':>6} {'loss':>8} {'reconstruction':>15} {'alignment':>10}"]
    for record in records:
        losses = f"{record['loss']:8.3f} {record['reconstruction_loss']:15.3f} {record['alignment_loss']:10.3f}"
        lines.append(f"  {record['step']:>6} {losses}  {'█' * round(record['loss'] / top * longest)}")
    return "\n".join(lines)


def cosine_table(model: LLM2VecGen, width: int = 80) -> str:
    """Returns the cosines between the centered embeddings of QUESTIONS and ANSWERS, and the answers."""
    embeddings = model.encode([*QUESTIONS, *ANSWERS])
    # Embeddings of one LLM have a large common component, which would dominate the cosines.
    embeddings = embeddings - embeddings.mean(axis=0)
    cosines = model.similarity(embeddings[: len(QUESTIONS)], embeddings[len(QUESTIONS) :])
    hits = int(np.sum(cosines.argmax(axis=1) == np.arange(len(QUESTIONS))))
    names = [f"a{number}" for number in range(1, len(ANSWERS) + 1)]
    room = width - 4 - 7 * len(names)  # of a question
    lines = ["cosine of questions (rows) and answers (columns), centered"]
    lines.append(" " * (room + 4) + "".join(f"{name:>5}  " for name in names).rstrip())
    for question, row in zip(QUESTIONS, cosines):
        cells = "  ".join(f"{value:5.2f}" for value in row)
        lines.append(f"  {shorten(question, room):<{room}}  {cells}")
    lines += [f"  {name}: {shorten(answer, width - 6)}" for name, answer in zip(names, ANSWERS)]
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
            "next, a page that shows what these embeddings encode:",
            f"  {command_prefix()}lens report {model_directory} \\",
            f"    input={queries} field=question output={output / 'report.html'}",
            "and the vectors of your own texts, one per line:",
            f"  {command_prefix()}encode {model_directory} input=FILE.txt output=vectors",
        ]
    )
