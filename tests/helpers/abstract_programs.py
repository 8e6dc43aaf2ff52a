"""Every program of the package on abstract arguments: lowered and compiled for devices that need not be here."""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.files import read_json
from llm2vec_gen_jax.inference import encode, generate
from llm2vec_gen_jax.lens import index, logit, search, states
from llm2vec_gen_jax.model import lora, quantization
from llm2vec_gen_jax.model.architecture import Architecture, from_hf_config
from llm2vec_gen_jax.model.backbone import Backbone, abstract_params
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel, Packed
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.teachers import encoder
from llm2vec_gen_jax.training import llm2vec, ridge, supervised, train_teacher
from llm2vec_gen_jax.training.optimizer import make_optimizer
from llm2vec_gen_jax.training.step import abstract_cache, jit_losses, jit_prefill, jit_step, new_state

TINY = Architecture(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=True,
    tied_embeddings=True,
)
ARCHITECTURES = pathlib.Path(__file__).parents[2] / "configs" / "architectures"
SUPERVISED = config.LossConfig(repeat=1.0, negative=1.0, margin=1.0, contrastive=1.0)


def architecture(name):
    """The architecture of a real backbone."""
    path = ARCHITECTURES / f"{name}.json"
    return from_hf_config(read_json(path), path)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of one model: a method for each returns (jitted function, its abstract arguments).

    B, T, S: rows, query tokens (or tokens of a row), answer tokens.
    """

    devices: tuple
    mesh_sizes: tuple = (1, 1, 1)
    architecture: Architecture = TINY
    dtype: str = "bfloat16"
    attention: str = "auto"
    remat: str = "dots"
    num_tokens: int = 10
    num_thought_tokens: int = 0
    lora_rank: int = 0
    B: int = 8
    T: int = 64
    S: int = 64

    @functools.cached_property
    def mesh(self):
        return sharding.make_mesh(config.MeshConfig(*self.mesh_sizes), self.devices)

    @functools.cached_property
    def execution(self):
        return Execution(self.mesh, self.attention, self.remat)

    @functools.cached_property
    def model(self):
        a, rank = self.architecture, self.lora_rank
        scale = 16 / rank if rank else 0.0
        return LLM2VecGenModel(a, self.num_tokens, self.num_thought_tokens, a.hidden_size, rank, scale, self.execution)

    @functools.cached_property
    def plain(self):
        """The model that teachers are: without compression tokens that matter."""
        a = self.architecture
        return LLM2VecGenModel(a, 1, 0, a.hidden_size, execution=self.execution)

    @functools.cached_property
    def frozen(self):
        boxed = abstract_params(self.architecture)
        dtype = quantization.product_dtype(jnp.dtype(self.dtype))
        frozen = jax.tree.map(
            lambda x, put: jax.ShapeDtypeStruct(x.shape, dtype, sharding=put),
            nn.unbox(boxed),
            sharding.param_shardings(boxed, self.mesh),
        )
        return quantization.describe(frozen) if self.dtype == "int8" else frozen

    @functools.cached_property
    def trainable(self):
        return self.whole(jax.eval_shape(self.model.init, jax.random.key(0), self.frozen))

    def whole(self, tree):
        """A tree of shapes that every device holds whole."""
        put = sharding.replicated(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=put), tree)

    def rows(self, *shape, dtype=jnp.int32):
        """An array split as a batch is."""
        return jax.ShapeDtypeStruct((self.B, *shape), dtype, sharding=sharding.batch_sharding(self.mesh))

    @functools.cached_property
    def packed(self):
        ids = self.rows(self.T)
        return Packed(ids, ids, ids, self.rows(max(self.T // self.model.num_appended, 1)))

    def prefix(self):
        return jit_prefill(self.model, self.T), (self.frozen, self.rows(self.T), self.rows())

    def prefilled(self, ids, lengths):
        """Keys and values of ids; with a LoRA the ids."""
        if self.lora_rank:
            return ids
        return abstract_cache(jit_prefill(self.model, self.T), self.mesh, self.frozen, ids, lengths)

    def settings(self, loss=None):
        settings = config.TrainConfig()
        settings.loss, settings.lora.rank = loss or config.LossConfig(), self.lora_rank
        return settings

    def batch(self, settings):
        a, X = self.architecture, len(supervised.texts(settings.loss))
        batch = {"query_lengths": self.rows(), "answer": self.rows(self.S), "answer_lengths": self.rows()}
        batch["target"] = self.rows(a.hidden_size, dtype=jnp.float32)
        batch["query"] = self.prefilled(self.rows(self.T), self.rows())
        if X:
            batch |= {"extra_lengths": self.rows(X), "negative_target": batch["target"]}
            batch["extra"] = self.prefilled(self.rows(X, self.T), batch["extra_lengths"])
        return batch

    def losses(self):
        settings = self.settings()
        return jit_losses(settings, self.model), (self.trainable, self.frozen, self.batch(settings))

    def step(self, loss=None):
        settings = self.settings(loss)
        optimizer = make_optimizer(settings.optimizer)
        state = self.whole(jax.eval_shape(functools.partial(new_state, optimizer=optimizer), self.trainable))
        return jit_step(settings, self.model), (state, self.frozen, self.batch(settings))

    def encode(self):
        return encode._encode.jitted(self.execution), (self.model, False, self.trainable, self.frozen, self.packed)

    def teacher(self, causal=False):
        arguments = self.plain, causal, self.frozen, self.rows(self.T), self.rows()
        return encoder._mean_pool.jitted(self.execution), arguments

    def stage(self, name):
        """A training step of a teacher: "mntp" or "simcse"."""
        settings, a = getattr(config.TeacherTrainConfig(), name), self.architecture
        optimizer = make_optimizer(config.OptimizerConfig())
        step = functools.partial(
            train_teacher.train_step,
            loss=llm2vec.mntp if name == "mntp" else functools.partial(llm2vec.simcse, scale=20.0),
            model=self.plain,
            optimizer=optimizer,
            scale=2.0,
            rates=(settings.dropout, getattr(settings, "attention_dropout", 0.0)),
            seed=0,
        )
        tree = jax.eval_shape(functools.partial(lora.init, a, settings.rank), jax.random.key(0))
        state = self.whole(jax.eval_shape(functools.partial(new_state, optimizer=optimizer), tree))
        batch = {"text": self.rows(self.T), "text_lengths": self.rows()}
        if name == "mntp":
            batch |= {"positions": self.rows(self.T // 5), "label": self.rows(self.T // 5)}
        jitted = jax.jit(step, donate_argnums=0, compiler_options=self.execution.compiler_options)
        return jitted, (state, self.frozen, batch)

    def generate(self, soft_prompts=False, temperature=0.0, new_tokens=64):
        backbone, sampling = (
            Backbone(self.architecture, self.execution),
            generate.Sampling(new_tokens, temperature, 0.9),
        )
        soft = self.num_tokens, self.architecture.hidden_size
        prompt = self.rows(*soft, dtype=jnp.float32) if soft_prompts else self.rows(self.T)
        unroll = generate.unrolls(backbone, self.frozen, self.B, prompt.shape[1] + new_tokens)
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        arguments = backbone, sampling, (0,), unroll, self.frozen, prompt, self.rows(), self.rows(), seed
        return generate._generate.jitted(self.execution), arguments

    def states(self):
        layers = tuple(range(self.architecture.num_layers + 1))
        return states._states.jitted(self.execution), (self.model, layers, self.trainable, self.frozen, self.packed)

    def states_of_text(self):
        arguments = self.model, (1,), self.frozen, self.rows(self.T), self.rows(8)
        return index._states.jitted(self.execution), arguments

    def logit_lens(self, state="soft_prompts"):
        vectors = self.whole(jax.ShapeDtypeStruct((128, self.architecture.hidden_size), jnp.float32))
        return logit._project.jitted(self.execution), (self.model, state, 5, self.trainable, self.frozen, vectors)

    def search(self):
        D = self.architecture.hidden_size
        shapes = {"best": ((64, 5), jnp.float32), "rows": ((64, 5), jnp.int32), "states": ((64, D), jnp.float32)}
        shapes |= {"chunk": ((1024, D), jnp.float16), "start": ((), jnp.int32), "count": ((), jnp.int32)}
        best, *others = (self.whole(jax.ShapeDtypeStruct(*shape)) for shape in shapes.values())
        return search._merge_chunk, ((best, others[0]), *others[1:])

    def ridge(self):
        D = self.architecture.hidden_size
        batch = {"query_lengths": self.rows(), "target": self.rows(D, dtype=jnp.float32)}
        batch["query"] = self.prefilled(self.rows(self.T), self.rows())
        sums = self.whole(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, ridge._zero_sums(D, D))))
        origin = self.whole((jax.ShapeDtypeStruct((D,), jnp.float32),) * 2)
        jitted = jax.jit(functools.partial(ridge._add, self.model), out_shardings=sharding.replicated(self.mesh))
        return jitted, (sums, origin, self.trainable, self.frozen, batch)

    def merge(self, name="gate", rank=8):
        kernel = self.frozen["layers"][name]["kernel"]
        inner, outer = lora.kernel_dims(self.architecture)[name]
        L = self.architecture.num_layers
        a, b = (self.whole(jax.ShapeDtypeStruct((L, *x), jnp.float32)) for x in ((*inner, rank), (rank, *outer)))
        return lora._add, (kernel, a, b)

    def every(self):
        """Yields (name, jitted function, arguments) of all programs that this model has."""
        names = "prefix step losses encode teacher generate states states_of_text logit_lens search ridge".split()
        programs = {name: getattr(self, name) for name in names}
        programs["supervised step"] = functools.partial(self.step, SUPERVISED)
        programs["causal teacher"] = functools.partial(self.teacher, True)
        programs["sampled"] = functools.partial(self.generate, temperature=1.0)
        programs["decode"] = functools.partial(self.generate, soft_prompts=True)
        if self.dtype != "int8":
            programs |= {name: functools.partial(self.stage, name) for name in ("mntp", "simcse")}
            programs["merge"] = self.merge
        for name, program in programs.items():
            yield name, *program()
