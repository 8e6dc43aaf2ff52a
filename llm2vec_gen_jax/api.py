"""`LLM2VecGen`: a trained embedder, with the encode conventions of sentence-transformers."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError, nearest, not_finite, quote
from llm2vec_gen_jax.common.hub import DEFAULT_HUB, HubOptions
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.formats import published
from llm2vec_gen_jax.formats.published import PublishedModel
from llm2vec_gen_jax.inference import postprocess
from llm2vec_gen_jax.inference.encode import WINDOW, check_texts, encode_windows, warmup
from llm2vec_gen_jax.inference.generate import Sampling, generate_from_soft_prompts
from llm2vec_gen_jax.lens.logit import Candidate, logit_lens
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained import export, model_directory
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone, load_backbone, require_own_process
from llm2vec_gen_jax.teachers import documents
from llm2vec_gen_jax.teachers.documents import DocumentEncoder

_TOKENIZED = 512  # texts per call of the tokenizer, which keeps large objects for each of them


Tag = TypeVar("Tag")
Texts = str | Iterable[str]
Path = str | os.PathLike[str]


class EncodeOptions(TypedDict, total=False):
    """Options of `LLM2VecGen.encode` that do not change the type of its result."""

    prompt_name: str | None
    prompt: str | None
    batch_size: int
    show_progress_bar: bool
    precision: str
    normalize_embeddings: bool
    truncate_dim: int | None
    max_length: int | None
    by_teacher: bool


class LLM2VecGen:
    """Text embeddings that encode the answer an LLM would give (arXiv 2603.10913).

    model: shapes of the compressor and the backbone. trainable: compression tokens and heads. backbone: the frozen LLM
    with its tokenizer. prompts: name -> text prepended to inputs. max_seq_length: maximum tokens per text, including
    the compression tokens. record: the PublishedModel read from disk, if any. hub: access to the hub, for the teacher's
    weights.
    """

    def __init__(
        self,
        model: LLM2VecGenModel,
        trainable: dict[str, Any],
        backbone: LoadedBackbone,
        prompts: dict[str, str] | None = None,
        max_seq_length: int = 512,
        record: PublishedModel | None = None,
        hub: HubOptions = DEFAULT_HUB,
    ) -> None:
        self.model, self.trainable, self.backbone, self.record = model, trainable, backbone, record
        self.prompts = _checked_prompts(prompts)
        self.max_seq_length = max_seq_length
        self._hub = hub

    @classmethod
    def from_pretrained(
        cls,
        path: Path,
        dtype: str = "auto",
        backbone: Path | None = None,
        mesh: jax.sharding.Mesh | config_lib.MeshConfig | None = None,
        prompts: dict[str, str] | None = None,
        attention: str = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Loads a model directory, written by this or the published package, or a hub repository with that layout.

        dtype: backbone dtype (auto | float32 | bfloat16 | float16 | int8). backbone: path or hub id, default the one
        named in the directory. mesh: a Mesh, or a MeshConfig over the devices of all processes; default: the local
        devices on the data axis. attention: kernel (auto | xla | cudnn | pallas). revision, token, cache_dir,
        local_files_only: as in huggingface_hub; all but the revision apply to the backbone too, whose revision is the
        one that the directory records. prompts: default those that `save_pretrained`, or a SentenceTransformer, saved
        in the directory.
        Raises InputError naming the missing or incompatible part.
        """
        require_own_process()
        _checked_prompts(prompts)  # before the backbone is loaded
        hub = HubOptions(revision, token, cache_dir, local_files_only)
        folder = model_directory.local_folder(str(path), hub)
        record = published.read(folder)
        prompts = published.read_prompts(folder) if prompts is None else prompts
        if not isinstance(mesh, jax.sharding.Mesh):
            if not isinstance(mesh, config_lib.MeshConfig | None):
                raise InputError(f"mesh must be a jax.sharding.Mesh or a MeshConfig, found {type(mesh).__name__}")
            devices = None if mesh else jax.local_devices()
            mesh = sharding.make_mesh(mesh or config_lib.MeshConfig(), devices)
        name, hub = model_directory.backbone_source(record, hub, backbone)
        loaded = load_backbone(name, dtype, mesh, attention, hub)
        model, trainable = model_directory.to_model(record, loaded, path)
        return cls(model, trainable, loaded, prompts, record=record, hub=hub)

    @overload
    def encode(
        self, inputs: Texts, *, convert_to_numpy: Literal[True] = True, **options: Unpack[EncodeOptions]
    ) -> np.ndarray: ...

    @overload
    def encode(
        self,
        inputs: Texts,
        *,
        convert_to_numpy: Literal[True] = True,
        return_soft_prompts: Literal[True],
        **options: Unpack[EncodeOptions],
    ) -> tuple[np.ndarray, NDArray[np.float32]]: ...

    @overload
    def encode(
        self, inputs: Texts, *, convert_to_numpy: Literal[False], **options: Unpack[EncodeOptions]
    ) -> jax.Array: ...

    @overload
    def encode(
        self,
        inputs: Texts,
        *,
        convert_to_numpy: bool = True,
        return_soft_prompts: bool = False,
        **options: Unpack[EncodeOptions],
    ) -> Any: ...

    def encode(
        self,
        inputs: Texts,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        precision: str = "float32",
        convert_to_numpy: bool = True,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        max_length: int | None = None,
        return_soft_prompts: bool = False,
        by_teacher: bool = False,
    ) -> Any:
        """Returns embeddings (n, E) of a list of texts, or (E,) of one string, in input order.

        prompt, prompt_name: a text, or the name of one in self.prompts, prepended to every input with a space.
        batch_size: rows of 256 tokens per forward pass; short texts share a row. precision: float32; int8, uint8 (255
        steps over the range of each dimension in this call); binary, ubinary (signs, packed as by numpy.packbits), as
        in sentence-transformers. convert_to_numpy=False returns a jax.Array. truncate_dim: keep the first dimensions,
        before normalization. max_length: maximum tokens including the compression tokens, default self.max_seq_length.
        return_soft_prompts: return (embeddings, soft prompts (n, K, D)), the input of `decode`. by_teacher: encode with
        the teacher in the model directory (`teacher.keep` in training), for documents that are searched with vectors of
        this model; batch_size is then the number of texts. The first call loads it, a second backbone in memory.
        Raises InputError for an input that is not a string, an invalid option, and a text whose states overflow the
        dtype of the backbone.

        Other texts in the call change a vector by rounding only, which depends on the device and the backbone: for
        SmolLM2-135M on a CPU with AMX by at most 5e-5 of its largest component with float32, and 5e-2 with bfloat16,
        as much as bfloat16 differs from float32 (cosine 0.998).
        """
        texts, single = check_texts(inputs), isinstance(inputs, str)
        options.check_arguments(config_lib.EncodeConfig, batch_size=batch_size, truncate_dim=truncate_dim)
        for name, value in {
            "normalize_embeddings": normalize_embeddings,
            "show_progress_bar": show_progress_bar,
            "convert_to_numpy": convert_to_numpy,
            "return_soft_prompts": return_soft_prompts,
            "by_teacher": by_teacher,
        }.items():
            options.check_argument(config_lib.EncodeConfig, "normalize", value, name)
        if precision not in postprocess.PRECISIONS:
            raise InputError(f"precision {precision!r} is unknown{nearest(str(precision), postprocess.PRECISIONS)}")
        prefix, limit = self._prompt(prompt, prompt_name), self.text_length(max_length)
        if by_teacher and return_soft_prompts:
            raise InputError("return_soft_prompts: the teacher has none. Pass it without by_teacher")
        embeddings: Any
        soft_prompts: Any = None
        if by_teacher:
            embeddings = self._teacher_vectors(texts, prefix, batch_size, max_length, show_progress_bar)
        else:
            arguments = texts, prefix, limit, batch_size, return_soft_prompts, show_progress_bar
            embeddings, soft_prompts = self._vectors(*arguments)
        embeddings = postprocess.finish(embeddings, truncate_dim, normalize_embeddings)
        result: Any = postprocess.quantize(embeddings, precision)
        if not convert_to_numpy:
            result = jnp.asarray(result)
        if single:
            result, soft_prompts = result[0], soft_prompts[0] if return_soft_prompts else None
        return (result, soft_prompts) if return_soft_prompts else result

    def _vectors(
        self, texts: Sequence[str], prefix: str, limit: int, batch_size: int, return_soft_prompts: bool, show: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Returns (embeddings (n, E), soft prompts (n, K, D) or None) of texts of at most `limit` tokens."""
        windows = (
            (start, self.tokenize(texts[start : start + WINDOW], prefix, limit, start))
            for start in range(0, len(texts), WINDOW)
        )

        def on_not_finite(start: int, row: int) -> None:
            name = f"input {start + row} (from 0), {quote(texts[start + row])}"
            raise not_finite(name, self.backbone.dtype)

        K, D, E = self.model.num_tokens, self.model.architecture.hidden_size, self.model.embedding_size
        embeddings = np.zeros((len(texts), E), np.float32)
        soft_prompts: Any = np.zeros((len(texts), K, D), np.float32) if return_soft_prompts else None
        with progress.bar(len(texts), "text", "encode", enabled=show) as bar:
            arguments = windows, batch_size, return_soft_prompts, bar, on_not_finite
            for start, window_embeddings, window_soft_prompts in self.encode_windows(*arguments):
                rows = slice(start, start + len(window_embeddings))
                embeddings[rows] = window_embeddings
                if return_soft_prompts:
                    soft_prompts[rows] = window_soft_prompts
        return embeddings, soft_prompts

    def _teacher_vectors(
        self, texts: Sequence[str], prefix: str, batch_size: int, max_length: int | None, show: bool
    ) -> NDArray[np.float32]:
        """Returns the vectors (n, E) of texts by the teacher."""
        encoder = self.document_encoder
        limit = encoder.teacher.max_length if max_length is None else max_length
        teacher = dataclasses.replace(encoder.teacher, batch_size=batch_size, max_length=limit, show_progress=show)
        return dataclasses.replace(encoder, teacher=teacher).encode(texts, prefix)

    @functools.cached_property
    def document_encoder(self) -> DocumentEncoder:
        """The teacher in the model directory, which encodes documents. Raises InputError if there is none."""
        if not (self.record and self.record.teacher):
            raise InputError(
                "by_teacher: the model directory has no teacher. Train with teacher.keep=true, or encode documents "
                "without by_teacher"
            )
        require_own_process()
        return documents.load(self.record.teacher, self.backbone, self._hub)

    def tokenize(
        self, texts: Sequence[str], prefix: str = "", limit: int | None = None, first: int = 0
    ) -> list[NDArray[np.int32]]:
        """Returns an array of at most `limit` ids for each text, without the appended tokens.

        prefix: prepended to every text with a space. first: index of texts[0] in error messages.
        """
        limit = self.text_length() if limit is None else limit
        ids = []
        for start in range(0, len(texts), _TOKENIZED):
            rows = self.backbone.tokenizer.encode(texts[start : start + _TOKENIZED], limit, first + start, prefix)
            ids += [np.array(row, np.int32) for row in rows]
        return ids

    def encode_windows(
        self,
        windows: Iterable[tuple[Tag, Sequence[NDArray[np.int32]]]],
        batch_size: int,
        soft_prompts: bool,
        bar: Any,
        on_not_finite: Callable[[Tag, int], None] | None = None,
    ) -> Iterator[tuple[Tag, NDArray[np.float32], NDArray[np.float32] | None]]:
        """Encodes a stream of tokenized texts: see inference.encode.encode_windows."""
        require_own_process()
        parameters = self.model, self.trainable, self.backbone
        return encode_windows(*parameters, windows, batch_size, soft_prompts, bar, on_not_finite)

    def text_length(self, max_length: int | None = None) -> int:
        """Returns the maximum tokens of a text: max_length, default max_seq_length, minus the appended tokens."""
        max_length = self.max_seq_length if max_length is None else max_length
        if isinstance(max_length, int) and max_length <= self.model.num_appended:
            raise InputError(f"max_length must exceed the {self.model.num_appended} appended tokens")
        options.check_arguments(config_lib.EncodeConfig, max_length=max_length)
        length: int = max_length - self.model.num_appended
        return length

    def warmup(
        self,
        batch_size: int = 32,
        max_length: int | None = None,
        return_soft_prompts: bool = False,
        show_progress_bar: bool = False,
    ) -> int:
        """Compiles all programs that `encode` needs with these options. Returns their number.

        Later calls do not compile. Set jax_compilation_cache_dir to keep compiled programs on disk.
        """
        require_own_process()
        options.check_arguments(config_lib.EncodeConfig, batch_size=batch_size)
        length = self.text_length(max_length) + self.model.num_appended
        parameters = self.model, self.trainable, self.backbone
        return warmup(*parameters, length, batch_size, return_soft_prompts, show_progress_bar)

    @property
    def identity(self) -> str:
        """Hash, 16 hex digits, of what the embeddings depend on: tokens, heads, LoRA, backbone weights, tokenizer."""
        architecture, *settings = dataclasses.astuple(self.model)
        computing = tuple(architecture[: len(self.model.architecture.to_dict())])
        digest = hashlib.sha256(repr((computing, *settings)).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.trainable):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
        digest.update(self.backbone.identity.encode())
        digest.update(self.backbone.tokenizer.plain.to_str().encode())
        return digest.hexdigest()[:16]

    @overload
    def encode_query(self, inputs: Texts, **options: Unpack[EncodeOptions]) -> np.ndarray: ...

    @overload
    def encode_query(self, inputs: Texts, **options: Any) -> Any: ...

    def encode_query(self, inputs: Texts, **options: Any) -> Any:
        """`encode` with the prompt named "query", if it exists."""
        return self.encode(inputs, **self._default_prompt(options, "query"))

    @overload
    def encode_document(self, inputs: Texts, **options: Unpack[EncodeOptions]) -> np.ndarray: ...

    @overload
    def encode_document(self, inputs: Texts, **options: Any) -> Any: ...

    def encode_document(self, inputs: Texts, **options: Any) -> Any:
        """`encode` with the first existing prompt of "document", "passage" and "corpus"; none with by_teacher."""
        names = () if options.get("by_teacher") else ("document", "passage", "corpus")
        return self.encode(inputs, **self._default_prompt(options, *names))

    def decode(
        self,
        soft_prompts: ArrayLike,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
        show_progress_bar: bool = False,
    ) -> list[str] | str:
        """Returns the texts that the frozen LLM generates from soft prompts (n, K, D); a string for (K, D).

        Raises InputError as `encode` does.
        """
        require_own_process()
        options.check_arguments(config_lib.DecodeConfig, batch_size=batch_size, seed=seed)
        sampling = Sampling(max_new_tokens, temperature, top_p)
        try:
            soft_prompts = np.asarray(soft_prompts)
        except ValueError:
            raise InputError("soft prompts must be one array: the rows have different lengths") from None
        K, D = self.model.num_tokens, self.model.architecture.hidden_size
        if soft_prompts.shape[-2:] != (K, D) or soft_prompts.ndim not in (2, 3) or soft_prompts.dtype.kind not in "fiu":
            found = f"{soft_prompts.dtype} {soft_prompts.shape}"
            raise InputError(f"soft prompts must be numbers (n, {K}, {D}) or ({K}, {D}), found {found}")
        with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinite
            soft_prompts = soft_prompts.astype(np.float32)
        rows = soft_prompts.reshape(-1, K, D)
        if not (is_finite := np.isfinite(rows).all(axis=(1, 2))).all():
            raise InputError(f"soft prompts: row {np.argmin(is_finite)} (from 0) holds NaN or infinity")
        texts = []
        with progress.bar(len(rows), "text", "decode", enabled=show_progress_bar) as bar:
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                numbers = np.arange(start, start + len(part))
                ids = generate_from_soft_prompts(self.backbone, part, sampling, seed, numbers)
                for number, row in zip(numbers, ids):
                    if row is None:
                        raise not_finite(f"soft prompts: row {number} (from 0)", self.backbone.dtype)
                    texts.append(self.backbone.tokenizer.decode(row))
                bar.update(len(part))
        return texts[0] if soft_prompts.ndim == 2 else texts

    @overload
    def logit_lens(self, inputs: str, top_k: int = 5, **options: Any) -> list[list[Candidate]]: ...

    @overload
    def logit_lens(self, inputs: Iterable[str], top_k: int = 5, **options: Any) -> list[list[list[Candidate]]]: ...

    def logit_lens(self, inputs: Texts, top_k: int = 5, **options: Any) -> list[Any]:
        """Returns the top_k (text, probability) of the LM head, for each of the K compression tokens of each text.

        For one string: for each of its K tokens. options: those of lens.logit.logit_lens.
        """
        require_own_process()
        candidates = logit_lens(self, check_texts(inputs), top_k, **options)
        return candidates[0] if isinstance(inputs, str) else candidates

    def similarity(self, first: ArrayLike, second: ArrayLike) -> NDArray[np.float32]:
        """Returns the cosine similarities (n, m) of two sets of embeddings."""
        with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinite
            first, second = (np.atleast_2d(np.asarray(x, np.float32)) for x in (first, second))
        if first.shape[1:] != second.shape[1:]:
            raise InputError(f"similarity: vectors of different dimensions, {first.shape} and {second.shape}")
        for x in (first, second):
            postprocess.require_finite(x, "NaN or infinity", what="similarity: vector")
        cosines: NDArray[np.float32] = postprocess.l2_normalize(first) @ postprocess.l2_normalize(second).T
        return cosines

    def save_pretrained(self, path: Path, dtype: str | None = None, backbone: Path | None = None) -> None:
        """Writes a model directory that both packages load (export.save_pretrained). `path` must not exist."""
        if dtype is not None:
            options.check_arguments(config_lib.FromPytorchConfig, dtype=dtype)
        export.save_pretrained(self, pathlib.Path(path).expanduser(), dtype, backbone)

    def save_merged(self, path: Path) -> None:
        """Writes the encoder as a transformers model folder (export.save_merged). `path` must not exist."""
        export.save_merged(self, pathlib.Path(path).expanduser())

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | None = None) -> str:
        """Uploads the model directory to the Hugging Face hub (export.push_to_hub). Returns its URL."""
        url: str = export.push_to_hub(self, repo_id, private, token)
        return url

    def __getstate__(self) -> Any:
        raise TypeError(
            "an LLM2VecGen holds device arrays and cannot be pickled: pass the path of its model directory, and load "
            "it with from_pretrained in the other process"
        )

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        copied.__dict__ |= self.__dict__
        return copied

    @property
    def special_tokens(self) -> list[str]:
        """Texts of the compression tokens, in the order in which they are appended to a text."""
        names: list[str] = model_directory.special_token_names(self.model.num_appended)
        return self.record.special_tokens if self.record else names

    def get_embedding_dimension(self) -> int:
        """Returns the embedding dimension E."""
        return self.model.embedding_size

    def _prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        if prompt is not None:
            options.check_argument(config_lib.EncodeConfig, "instruction", prompt, "prompt")
            return prompt
        if prompt_name is None:
            return ""
        if prompt_name not in self.prompts:
            raise InputError(f"prompt_name {prompt_name!r} is unknown{nearest(str(prompt_name), self.prompts)}")
        return self.prompts[prompt_name]

    def _default_prompt(self, options: dict[str, Any], *names: str) -> dict[str, Any]:
        if options.get("prompt") is not None or options.get("prompt_name") is not None:
            return options
        return {**options, "prompt_name": next((name for name in names if name in self.prompts), None)}


def load_configured_model(path: Path, config: Any, mesh: jax.sharding.Mesh | None = None) -> LLM2VecGen:
    """Loads the MODEL of a command's config, such as an EncodeConfig. mesh: default that of the config."""
    return LLM2VecGen.from_pretrained(
        path,
        config.dtype,
        mesh=mesh or config.mesh,
        attention=config.kernels.attention,
        revision=config.revision,
        **config_lib.hub_access(config),
    )


def _checked_prompts(prompts: Mapping[str, str] | None) -> dict[str, str]:
    prompts = {} if prompts is None else prompts
    if not isinstance(prompts, Mapping) or not all(isinstance(x, str) for pair in prompts.items() for x in pair):
        raise InputError("prompts must be a dict of names and texts")
    return dict(prompts)
