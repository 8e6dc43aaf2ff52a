"""`LLM2VecGen`: a trained embedder, with the encode conventions of sentence-transformers."""

import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax import directory, export, sharding
from llm2vec_gen_jax.encode import encode_ids
from llm2vec_gen_jax.errors import InputError, nearest
from llm2vec_gen_jax.generate import Sampling, generate_from_soft_prompts
from llm2vec_gen_jax.loading import load_backbone

_PRECISIONS = ("float32", "int8", "binary")


class LLM2VecGen:
    """Text embeddings that encode the answer an LLM would give (arXiv 2603.10913).

    model: the method's shapes. trainable: tokens and heads. backbone: the frozen LLM with its tokenizer.
    prompts: name -> text put before inputs. max_seq_length: tokens of a text, the compression tokens included.
    record: the PublishedModel that it was read from, if it was.
    """

    def __init__(self, model, trainable, backbone, prompts=None, max_seq_length=512, record=None):
        self.model, self.trainable, self.backbone, self.record = model, trainable, backbone, record
        self.prompts = dict(prompts or {})
        self.max_seq_length = max_seq_length

    @classmethod
    def from_pretrained(cls, path, dtype="auto", backbone=None, mesh=None, prompts=None):
        """Loads a model directory (ours or the published package's) or a hub repository of that layout.

        dtype: of the backbone (auto | float32 | bfloat16 | float16). backbone: where it is, if not where the
        directory says. mesh: a MeshConfig or a Mesh, default all devices on the data axis.
        Raises InputError that names what is missing or does not fit.
        """
        record = directory.read(str(path))
        if not isinstance(mesh, jax.sharding.Mesh):
            mesh = sharding.make_mesh(mesh or config_lib.MeshConfig())
        loaded = load_backbone(str(backbone or record.backbone), dtype, mesh)
        model, trainable = directory.to_model(record, loaded, path)
        return cls(model, trainable, loaded, prompts, record=record)

    def encode(
        self,
        inputs,
        *,
        prompt_name=None,
        prompt=None,
        batch_size=32,
        show_progress_bar=False,
        precision="float32",
        convert_to_numpy=True,
        normalize_embeddings=False,
        truncate_dim=None,
        max_length=None,
        return_soft_prompts=False,
    ):
        """Returns embeddings (n, E) of a list of texts, or (E,) of one string, in the order of the inputs.

        prompt, prompt_name: text, or the name of one of self.prompts, put before every input with one space.
        precision: float32; int8 (per-dimension range of this call); binary (sign bits packed as in numpy.packbits,
        int8). convert_to_numpy=False gives a jax.Array. truncate_dim keeps the first dimensions, before
        normalisation. max_length: tokens, the compression tokens included; default self.max_seq_length.
        return_soft_prompts: return (embeddings, soft prompts (n, K, D)), which `decode` reads.
        """
        single = isinstance(inputs, str)
        texts = [inputs] if single else list(inputs)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"input {number} must be a string, found {type(text).__name__}")
        if batch_size < 1:
            raise InputError(f"batch_size must be positive, found {batch_size}")
        if precision not in _PRECISIONS:
            raise InputError(f"precision {precision!r} is unknown{nearest(precision, _PRECISIONS)}")
        prefix = self._prompt(prompt, prompt_name)
        limit = (self.max_seq_length if max_length is None else max_length) - self.model.num_appended
        if limit < 1:
            raise InputError(f"max_length must exceed the {self.model.num_appended} appended tokens")
        ids = self.backbone.tokenizer.encode([f"{prefix} {text}" if prefix else text for text in texts], limit)
        if ids:
            embeddings, soft_prompts = encode_ids(
                self.model, self.trainable, self.backbone, ids, batch_size, return_soft_prompts, show_progress_bar
            )
        else:
            embeddings = np.zeros((0, self.model.embedding_size), np.float32)
            soft_prompts = np.zeros((0, self.model.num_tokens, self.model.architecture.hidden_size), np.float32)
        embeddings = _finish(embeddings, truncate_dim, normalize_embeddings, precision)
        if not convert_to_numpy:
            embeddings = jnp.asarray(embeddings)
        if single:
            embeddings = embeddings[0]
            soft_prompts = soft_prompts[0] if return_soft_prompts else None
        return (embeddings, soft_prompts) if return_soft_prompts else embeddings

    def encode_query(self, inputs, **options):
        """`encode` with the prompt named "query", if there is one."""
        return self.encode(inputs, **self._default_prompt(options, "query"))

    def encode_document(self, inputs, **options):
        """`encode` with the prompt named "document", if there is one."""
        return self.encode(inputs, **self._default_prompt(options, "document"))

    def decode(self, soft_prompts, max_new_tokens=128, temperature=0.0, top_p=1.0, seed=0, batch_size=16):
        """Returns the texts that the frozen LLM reads out of soft prompts (n, K, D); of one (K, D), a string."""
        soft_prompts = np.asarray(soft_prompts)
        K, D = self.model.num_tokens, self.model.architecture.hidden_size
        numbers = np.issubdtype(soft_prompts.dtype, np.number)
        if soft_prompts.shape[-2:] != (K, D) or soft_prompts.ndim not in (2, 3) or not numbers:
            found = f"{soft_prompts.dtype} {soft_prompts.shape}"
            raise InputError(f"soft prompts must be numbers (n, {K}, {D}) or ({K}, {D}), found {found}")
        soft_prompts = soft_prompts.astype(np.float32)
        rows = soft_prompts.reshape(-1, K, D)
        sampling = Sampling(max_new_tokens, temperature, top_p)
        texts = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            numbers = np.arange(start, start + len(part))
            ids = generate_from_soft_prompts(self.backbone, part, sampling, seed, numbers)
            texts += [self.backbone.tokenizer.decode(row) for row in ids]
        return texts[0] if soft_prompts.ndim == 2 else texts

    def similarity(self, first, second):
        """Returns the cosine matrix (n, m) of two sets of embeddings."""
        first, second = (np.atleast_2d(np.asarray(x, np.float32)) for x in (first, second))
        return _normalize(first) @ _normalize(second).T

    def save_pretrained(self, path, dtype=None, backbone=None):
        """Writes a model directory of both frameworks (export.save_pretrained). `path` must not exist."""
        export.save_pretrained(self, path, dtype, backbone)

    def save_merged(self, path):
        """Writes the encoder as a plain transformers folder (export.save_merged). `path` must not exist."""
        export.save_merged(self, path)

    def push_to_hub(self, repo_id, private=False, token=None):
        """Uploads the model directory to the Hugging Face hub (export.push_to_hub). Returns its URL."""
        return export.push_to_hub(self, repo_id, private, token)

    @property
    def special_tokens(self):
        """Texts of the trained tokens, in the order in which they follow a text."""
        if self.record:
            return self.record.special_tokens
        return directory.special_token_names(self.model.num_appended)

    def get_embedding_dimension(self):
        """Returns E."""
        return self.model.embedding_size

    def _prompt(self, prompt, prompt_name):
        if prompt is not None:
            return prompt
        if prompt_name is None:
            return ""
        if prompt_name not in self.prompts:
            raise InputError(f"prompt_name {prompt_name!r} is unknown{nearest(prompt_name, self.prompts)}")
        return self.prompts[prompt_name]

    def _default_prompt(self, options, name):
        explicit = "prompt" in options or "prompt_name" in options
        return options if explicit or name not in self.prompts else {**options, "prompt_name": name}


def _finish(embeddings, truncate_dim, normalize, precision):
    if truncate_dim is not None:
        if not 1 <= truncate_dim <= embeddings.shape[1]:
            raise InputError(f"truncate_dim must be within 1 and {embeddings.shape[1]}, found {truncate_dim}")
        embeddings = embeddings[:, :truncate_dim]
    if normalize:
        embeddings = _normalize(embeddings)
    if precision == "int8" and len(embeddings):
        low, high = embeddings.min(axis=0), embeddings.max(axis=0)
        scale = np.maximum(high - low, 1e-12) / 255
        return np.clip(np.round((embeddings - low) / scale) - 128, -128, 127).astype(np.int8)
    if precision == "int8":
        return embeddings.astype(np.int8)
    if precision == "binary":
        return (np.packbits(embeddings > 0, axis=-1).astype(np.int16) - 128).astype(np.int8)
    return embeddings


def _normalize(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
