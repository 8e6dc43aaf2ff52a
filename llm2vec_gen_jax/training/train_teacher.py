"""An unsupervised teacher for any backbone: MNTP, merged, then SimCSE (LLM2Vec, BehnamGhader et al. 2024)."""

import dataclasses
import functools
import pathlib

import jax

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import require_written
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.data.texts import read_texts
from llm2vec_gen_jax.formats import peft
from llm2vec_gen_jax.inference.respond import load_configured_backbone, respond
from llm2vec_gen_jax.inference.synthesize import synthesize
from llm2vec_gen_jax.model import lora
from llm2vec_gen_jax.model.execution import first_remat
from llm2vec_gen_jax.model.layers import Dropout
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import processes, sharding
from llm2vec_gen_jax.training import llm2vec, step_memory
from llm2vec_gen_jax.training.loop import Run
from llm2vec_gen_jax.training.optimizer import make_optimizer
from llm2vec_gen_jax.training.programs import CompiledCache
from llm2vec_gen_jax.training.run_directory import prepare_run_directory
from llm2vec_gen_jax.training.step import update


def train_teacher(config, show_progress=True):
    """Runs (or resumes) both stages of a TeacherTrainConfig. Returns the list of adapter folders, in merging order.

    Each stage is a run of its own in STAGE-run/, and leaves a PEFT folder STAGE/. Raises InputError for bad
    configuration or data, FloatingPointError naming the step of a non-finite loss.
    """
    options.require(config, "train.output")
    if config.corpus.path is None and jax.process_count() > 1:
        raise InputError("corpus.path is needed with several processes: make it first, by synthesize and respond")
    with processes.locked(config.train.output, "train.output"):
        return _train_teacher(config, show_progress)


def _train_teacher(config, show_progress):
    output = pathlib.Path(config.train.output)
    prepare_run_directory(output, config)
    backbone = load_configured_backbone(config, jax.devices())
    texts = corpus(config, output, backbone)
    adapters = []
    for name, stage in (("mntp", _mntp), ("simcse", _simcse)):
        settings = getattr(config, name)
        if not settings.steps:
            continue
        folder = output / name
        if folder.exists():
            print(f"{folder}: already finished")
        else:
            trainer = AdapterTrainer(stage(config, backbone, texts), config, settings, backbone)
            tree = _run(trainer, config, settings, output / f"{name}-run", show_progress)
            peft.save(folder, tree, settings.rank, settings.alpha, backbone.name, config.train.adapter_dtype)
        merged = peft.merge(backbone.frozen, folder, backbone.architecture)
        backbone = dataclasses.replace(backbone, frozen=merged)
        adapters.append(folder)
    if jax.process_index() == 0:
        require_written(output / "config.yaml", *adapters)
    return adapters


def corpus(config, output, backbone):
    """Returns the texts of a TeacherTrainConfig: of corpus.path, or responses that the backbone writes itself."""
    source = config.corpus
    if source.path is not None:
        texts = [text.strip() for text in read_texts(source.path, source.field)]
    else:
        common = {
            "backbone": config.backbone,
            "kernels": config.kernels,
            "mesh": config.mesh,
            "seed": config.train.seed,
        }
        print(f"no corpus.path: {backbone.name} writes {source.queries} queries and responds to them", flush=True)
        queries = config_lib.SynthesizeConfig(**common, output=str(output / "queries.jsonl"), count=source.queries)
        responses = config_lib.RespondConfig(
            **common,
            input=str(synthesize(queries, backbone)),
            output=str(output / "responses.jsonl"),
            max_new_tokens=source.max_new_tokens,
        )
        texts = read_texts(respond(responses, backbone), "answer")
    texts = list(dict.fromkeys(text for text in texts if text))
    if not texts:
        raise InputError(f"corpus.path={source.path}: every text is empty")
    return texts


def _mntp(config, backbone, texts):
    """Returns (loss(updates, frozen, batch, dropout), batches) of the first stage."""
    settings = config.mntp
    mask_id = backbone.tokenizer.encode([settings.mask_token], 64)[0]
    if len(mask_id) != 1:
        raise InputError(f"mntp.mask_token={settings.mask_token!r} is {len(mask_id)} tokens of this backbone; give one")
    ids = backbone.tokenizer.encode(texts, 1 << 20)
    blocks = llm2vec.MaskedBlocks(
        ids,
        settings,
        mask_id[0],
        backbone.architecture.vocab_size,
        config.train.seed,
        jax.process_index(),
        jax.process_count(),
    )
    return functools.partial(llm2vec.mntp, causal=config.attention == "causal"), blocks


def _simcse(config, backbone, texts):
    """Returns (loss(updates, frozen, batch, dropout), batches) of the second stage."""
    settings = config.simcse
    texts = llm2vec.sentences(texts) if config.corpus.sentences else texts
    ids = backbone.tokenizer.encode(texts, settings.max_length)
    seed, processes = config.train.seed, (jax.process_index(), jax.process_count())
    batches = llm2vec.Sentences(ids, settings, seed, *processes)
    return functools.partial(llm2vec.simcse, scale=settings.scale, causal=config.attention == "causal"), batches


def _run(trainer, config, settings, output, show_progress):
    """Trains one stage. Returns its LoRA tree (float32, the scale not in it)."""
    train = config.train
    run_settings = config_lib.TrainSettings(
        steps=settings.steps,
        batch_size=settings.batch_size,
        output=str(output),
        log_every=train.log_every,
        checkpoint_every=train.checkpoint_every,
        checkpoint_minutes=train.checkpoint_minutes,
        keep_checkpoints=train.keep_checkpoints,
        watchdog=train.watchdog,
    )
    output.mkdir(parents=True, exist_ok=True)
    run = Run(trainer, run_settings, trainer.optimizer_config, trainer.backbone.mesh, output, config)
    run.start(resuming=True)  # the run directory of the command was verified: what is there is an earlier part of it
    run.loop(show_progress, output.name.removesuffix("-run"))
    return jax.tree.map(sharding.gather, run.state.trainable)


class AdapterTrainer:
    """Trains the LoRA of one stage: its loss, batches and programs."""

    def __init__(self, stage, config, settings, backbone):
        self.loss, self.batches = stage
        self.config, self.settings, self.backbone = config, settings, backbone
        self.record = {"backbone": backbone.identity, "data": self.batches.digest, "rank": settings.rank}
        self.optimizer_config = config_lib.OptimizerConfig(
            learning_rate=settings.learning_rate,
            schedule_steps=settings.schedule_steps or settings.steps,
            warmup_steps=settings.warmup_steps,
        )

    def init(self):
        """Returns a fresh LoRA tree."""
        init = functools.partial(lora.init, self.backbone.architecture, self.settings.rank)
        put = sharding.replicated(self.backbone.mesh)
        return jax.jit(init, out_shardings=put)(jax.random.key(self.config.train.seed))

    def begin(self, trainable):
        """Returns the tree as it is."""
        return trainable

    def describe(self, step):
        """Names the rows of the corpus that a step (from 0) reads."""
        return f"rows {self.batches.rows(step).tolist()} (from 0) of the corpus"

    def compile(self, state, steps, show_progress, heartbeat):
        """Returns the step as a function of (state, batch), compiled for every padded length of `steps`.

        The largest is compiled first, and resolves train.remat=auto.
        """
        mesh, frozen = self.backbone.mesh, self.backbone.frozen
        step_of = {self.batches.width(step): step for step in reversed(steps)}
        widths = sorted(step_of, reverse=True)
        programs = self._step_with(first_remat(self.config.train.remat))
        with progress.bar(len(widths), "batch shape", "compile", enabled=show_progress and len(widths) > 0) as bar:
            for number, width in enumerate(widths):
                heartbeat(f"the compilation for batch shape {number + 1} of {len(widths)}")
                batch = sharding.abstract_batch(self.batches[step_of[width]], mesh)
                if number == 0 and self.config.train.remat == "auto":
                    programs = step_memory.choose_remat(self._step_with, mesh, (state, frozen, batch))
                programs.compile(state, frozen, batch)
                bar.update(1)
        return lambda state, batch: programs(state, frozen, batch)

    def _step_with(self, remat):
        execution = dataclasses.replace(self.backbone.execution, remat=remat)
        a, settings = self.backbone.architecture, self.settings
        step = functools.partial(
            train_step,
            loss=self.loss,
            model=LLM2VecGenModel(a, 1, 0, a.hidden_size, execution=execution),
            optimizer=make_optimizer(self.optimizer_config),
            scale=settings.alpha / settings.rank,
            rates=(settings.dropout, getattr(settings, "attention_dropout", 0.0)),
            seed=self.config.train.seed,
        )
        return CompiledCache(jax.jit(step, donate_argnums=0, compiler_options=execution.compiler_options))


def train_step(state, frozen, batch, *, loss, model, optimizer, scale, rates, seed):
    """One update of a stage's LoRA. loss: of the stage. rates: dropout of the LoRA's inputs and of attention weights.

    Returns (new state, metrics of this step).
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    dropout = Dropout(jax.random.split(key, model.architecture.num_layers), *rates)
    return update(state, lambda t: (loss(model, lora.scaled(t, scale), frozen, batch, dropout=dropout), {}), optimizer)
