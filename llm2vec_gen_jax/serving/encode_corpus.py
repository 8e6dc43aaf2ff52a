"""Encodes a corpus into shards of vectors on disk: resumable, and divided between independent processes."""

import contextlib
import hashlib
import itertools
import logging
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.api import LLM2VecGen, load_configured_model
from llm2vec_gen_jax.common import locks, progress
from llm2vec_gen_jax.common.errors import InputError, not_finite, quote
from llm2vec_gen_jax.common.files import (
    atomic_path,
    entries,
    read_array,
    read_json,
    removed,
    require_same_run,
    sha256_file,
    write_json,
)
from llm2vec_gen_jax.common.jsonl import JsonlAppender
from llm2vec_gen_jax.config import EncodeConfig, options
from llm2vec_gen_jax.data.texts import Corpus, Row
from llm2vec_gen_jax.inference import postprocess, shards
from llm2vec_gen_jax.inference.encode import WINDOW
from llm2vec_gen_jax.parallel import sharding

logger = logging.getLogger(__name__)

CALIBRATION = 1024  # first texts, whose vectors determine the int8 ranges


def encode_corpus(path: str, config: EncodeConfig, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Encodes the corpus of an EncodeConfig with the model at `path`. Returns the manifest.

    check: called regularly; it may raise to interrupt the run, which a repeated call resumes.

    The vectors of a shard depend bit for bit on its texts alone, because texts are batched within shards.
    Raises InputError for bad input, and if the output holds another run, naming the difference.
    """
    options.require(config)
    config.shard.check()
    for key in ("save_soft_prompts", "warmup") if config.by_teacher else ():
        if getattr(config, key):
            raise InputError(f"{key}=true is not for by_teacher=true: remove one of them")
    output = pathlib.Path(str(config.output))
    if output.exists() and not output.is_dir():
        raise InputError(f"output={output}: exists and is not a folder")
    files = _Files(output, config)
    with locks.locked(files.share, "output"):  # fails before any work if the output cannot be written
        return _encode_corpus(path, config, files, check)


def _encode_corpus(path: str, config: EncodeConfig, files: "_Files", check: Callable[[], None]) -> dict[str, Any]:
    corpus = Corpus(str(config.input), config.field, config.id_field, config.stdin, check)
    files.check()
    identity = corpus.identity()
    mesh = sharding.make_mesh(config.mesh, jax.local_devices())
    model = load_configured_model(path, config, mesh)
    job = _Job(model, corpus, config, files, _run_record(model, identity, config), check)
    return job.finished_manifest() or job.run()


def _run_record(model: LLM2VecGen, identity: dict[str, Any], config: EncodeConfig) -> dict[str, Any]:
    """Returns everything that the bytes of the output depend on; a run is resumed only with an equal record."""
    settings = options.to_dict(config)
    other = ("input", "output", "warmup", "shard", "revision")  # the model has an identity instead of a revision
    for key in (*other, *config_lib.HUB_KEYS, *vars(config_lib.DistributedConfig())):
        settings.pop(key, None)
    settings["dtype"] = model.backbone.dtype
    settings["mesh"] = dict(model.backbone.mesh.shape)
    identity_of_model: dict[str, Any] = {"identity": model.identity, "backbone": model.backbone.identity}
    if settings.pop("by_teacher"):  # absent in records of earlier versions
        identity_of_model["teacher"] = model.document_encoder.identity
    return {
        "model": identity_of_model,
        "input": identity,
        "config": settings,
        "shard": options.to_dict(config.shard),
    }


class _Files:
    """Paths of the files that one share of the work writes to the output folder."""

    def __init__(self, output: pathlib.Path, config: EncodeConfig) -> None:
        output = output if output.name else output.resolve()  # "." has no name
        self.output, self.config = output, config
        index, count = config.shard.index, config.shard.count
        suffix = "" if count == 1 else f"-{index:05}-of-{count:05}"
        # Locked: what a share locks is in the output, because the folder above a mounted one may be read-only.
        self.share = output if count == 1 else output / f"progress{suffix}"
        self.manifest = output / f"manifest{suffix}.json"
        self.journal = output / f"progress{suffix}.jsonl"
        self.journal_record, self.journal_sums = JsonlAppender.sidecars(self.journal)
        self.ranges = output / "ranges.npy"

    def shard(self, number: int) -> pathlib.Path:
        return self.output / f"embeddings-{number:05}.{self.config.format}"

    def soft_prompts(self, number: int) -> pathlib.Path:
        return self.output / f"soft_prompts-{number:05}.npy"

    def check(self) -> None:
        """Raises InputError if the output is a folder that was not written by encode."""
        ours = re.compile(r"\.?(manifest|progress|embeddings|soft_prompts|ranges)\b")
        if self.output.exists() and not all(map(ours.match, entries(self.output))):
            raise InputError(f"output={self.output}: exists and holds other files. Choose another, or remove it")
        for path in self.output.glob("[mp]*.json*"):
            share = re.match(r"(?:manifest|progress)(?:-\d+-of-(\d+))?\.json", path.name)
            count = int(share[1] or 1) if share else self.config.shard.count
            counts = {"shard.count": count}, {"shard.count": self.config.shard.count}
            require_same_run(f"output={self.output}", *counts, "or choose another output")

    def remove_journal(self) -> None:
        """Removes the journal and its sidecars."""
        for path in (self.journal, self.journal_record, self.journal_sums):
            path.unlink(missing_ok=True)

    def remove_if_empty(self) -> None:
        """Removes the int8 ranges if no share has written or is running, and the folder if it is empty."""
        ours = {self.ranges.name, f".{self.share.name}.lock"}
        if self.output.exists() and {path.name for path in self.output.iterdir()} <= ours:
            self.ranges.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the lock is in it, and removes it
                self.output.rmdir()

    def remove_temporary(self) -> None:
        """Removes the temporary files that this share left when it was killed."""
        for path in self.output.glob(".*"):
            shard = re.match(r"\.(?:embeddings|soft_prompts)-(\d+)\.", path.name)
            ours = int(shard[1]) % self.config.shard.count == self.config.shard.index if shard else False
            if ours or path.name.startswith((f".{self.manifest.name}.", f".{self.journal.name}.", ".ranges.")):
                locks.remove_unlocked(path)


class _Job:
    """One share of the work. record: see _run_record. check: see encode_corpus."""

    def __init__(
        self,
        model: LLM2VecGen,
        corpus: Corpus,
        config: EncodeConfig,
        files: _Files,
        record: dict[str, Any],
        check: Callable[[], None],
    ) -> None:
        self.model, self.corpus, self.config, self.files, self.record = model, corpus, config, files, record
        self.check = check
        self.sizes: dict[pathlib.Path, int] = {}  # of the files in bytes
        self.done: dict[int, dict[str, Any]] = {}  # shard number -> its entry in the manifest
        self.size, self.share = config.shard_size, config.shard
        # The teacher appends no tokens.
        self.limit = config.max_length if config.by_teacher else model.text_length(config.max_length)
        if config.truncate_dim is not None and config.truncate_dim > model.get_embedding_dimension():
            raise InputError(f"truncate_dim={config.truncate_dim}: the vectors have {model.get_embedding_dimension()}")

    def finished_manifest(self) -> dict[str, Any] | None:
        """Returns the manifest of a finished run, or None. Raises InputError if the output holds another run."""
        files, record = self.files, None
        if files.manifest.exists():
            manifest = shards.read_manifest(files.manifest)
            record = {key: manifest.get(key) for key in self.record}
        elif files.journal.exists() and files.journal_record.exists():
            record = read_json(files.journal_record)
        if record is not None:
            require_same_run(f"output={files.output}", record, self.record, "choose another output, or remove it")
        if not files.manifest.exists():
            return None
        if self.corpus.streamed:
            raise InputError(f"output={files.output}: exists and is complete. Choose another, or remove it")
        intact = self._intact(manifest["shards"])
        if len(intact) < len(manifest["shards"]):  # continue as with an unfinished run
            files.remove_journal()
            with JsonlAppender(files.journal, self.record) as journal:
                journal.append(intact)
            files.manifest.unlink()
            return None
        files.remove_journal()  # left by a kill after the manifest was written
        files.remove_temporary()
        return manifest

    def run(self) -> dict[str, Any]:
        """Encodes the missing shards. Returns the manifest."""
        with JsonlAppender(self.files.journal, self.record) as journal:
            self.files.remove_temporary()
            self.done = {row["shard"]: row for row in self._intact(journal.rows)}
            try:
                self.files.check()  # again: a run with another number of shares may have started meanwhile
                self._encode(journal)
                manifest = self._manifest()
                journal.check()
                self._require_files()
                write_json(self.files.manifest, manifest)
                journal.remove()
            finally:
                if not self.done:  # leave nothing behind after an error in the first texts
                    journal.remove()
                    self.files.remove_if_empty()
        return manifest

    def _require_files(self) -> None:
        """Raises OSError if the size of a file of this share changed since it was written or checked."""
        for path, size in self.sizes.items():
            if not path.is_file() or path.stat().st_size != size:
                raise removed(path)

    def _intact(self, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the entries of a journal or manifest whose files match their checksums."""
        intact = []
        with progress.bar(len(entries), "shard", "check", enabled=bool(entries)) as bar:
            for entry in entries:
                intact += [entry] if self._is_intact(entry) else []
                bar.update(1)
        return intact

    def _is_intact(self, entry: dict[str, Any]) -> bool:
        if not shards.is_shard(entry) or entry["file"] != self.files.shard(entry["shard"]).name:
            logger.warning(f"{self.files.output}: a shard has an invalid record; encoding it again")
            return False
        digests = {"file": "sha256", "soft_prompts": "soft_prompts_sha256", "ranges": "ranges_sha256"}
        for name, digest in digests.items():
            path = self.files.output / entry.get(name, "")
            if name in entry and not (path.is_file() and sha256_file(path) == entry.get(digest)):
                logger.warning(f"{path}: missing or damaged; encoding its shard again")
                return False
            if name in entry:
                self.sizes[path] = path.stat().st_size
        return True

    def _in_share(self, shard: int) -> bool:
        return shard % self.share.count == self.share.index

    def _encode(self, journal: JsonlAppender) -> None:
        config = self.config
        if config.warmup:
            self.model.warmup(config.batch_size, config.max_length, config.save_soft_prompts)
        calibrate = config.precision == "int8" and not (self.done and self.files.ranges.exists())

        def needed(first, count):
            shards = range(first // self.size, (first + count - 1) // self.size + 1)
            missing = any(self._in_share(n) and (self.corpus.streamed or n not in self.done) for n in shards)
            return missing or (calibrate and first < CALIBRATION)

        texts, ranges = self.corpus.read(needed), None
        if calibrate:
            first_rows = list(itertools.islice(texts, CALIBRATION))
            self._write_ranges(first_rows)
            texts = itertools.chain(first_rows, texts)
        if config.precision == "int8":
            ranges = read_array(self.files.ranges, "ranges")
        count = self.corpus.count()
        numbers = range(self.share.index, -(-(count or 0) // self.size), self.share.count)
        total = count and sum(min(self.size, count - number * self.size) for number in numbers)
        already_done = sum(row["rows"][1] - row["rows"][0] for row in self.done.values())
        parts: list[tuple[Any, ...]] = []
        with progress.bar(total, "text", "encode", initial=already_done) as bar:
            stream: Any = self._encode_windows(self._windows(texts), config.save_soft_prompts, bar)
            with contextlib.closing(stream):  # its thread ends even if this one is interrupted
                for (rows, cut), embeddings, soft_prompts in stream:
                    self.check()
                    embeddings = postprocess.finish(embeddings, config.truncate_dim, config.normalize)
                    if parts and rows[0].number // self.size != parts[0][0][0].number // self.size:
                        self._write(journal, parts)
                        parts = []
                    embeddings = postprocess.quantize(embeddings, config.precision, ranges, rows[0].number)
                    parts.append((rows, embeddings, soft_prompts, cut))
                    if (rows[-1].number + 1) % self.size == 0:
                        self._write(journal, parts)
                        parts = []
            if parts:
                self._write(journal, parts)

    def _encode_windows(self, windows: Iterable[Any], soft_prompts: bool, bar: Any) -> Iterator[Any]:
        size, on_not_finite = self.config.batch_size, self._raise_not_finite
        if self.config.by_teacher:
            return self.model.document_encoder.encode_windows(windows, size, bar, on_not_finite)
        return self.model.encode_windows(windows, size, soft_prompts, bar, on_not_finite)

    def _windows(self, texts: Iterable[Row]) -> Iterator[tuple[Any, list[np.ndarray]]]:
        """Yields `_tokenize(rows)` for consecutive rows of each shard to be written."""
        digests = {shard: hashlib.sha256() for shard in self.done}
        window: list[Row] = []
        for row in texts:
            shard = row.number // self.size
            if shard in digests and self.corpus.streamed:
                self._check_unchanged(digests[shard], shard, row)
            if shard in digests or not self._in_share(shard):
                continue
            if window and (len(window) == WINDOW or window[0].number // self.size != shard):
                yield self._tokenize(window)
                window = []
            window.append(row)
        if window:
            yield self._tokenize(window)

    def _check_unchanged(self, digest: Any, shard: int, row: Row) -> None:
        """Raises InputError if standard input differs from the texts of a finished shard."""
        _update(digest, row)
        first, end = self.done[shard]["rows"]
        if row.number >= end or (row.number == end - 1 and digest.hexdigest() != self.done[shard]["texts_sha256"]):
            raise InputError(
                f"standard input: texts {first} to {end} differ from those encoded in {self.files.output}. "
                "Give the same input, or choose another output"
            )

    def _tokenize(self, rows: list[Row]) -> tuple[tuple[list[Row], int], list[np.ndarray]]:
        """Returns ((rows, number of truncated texts), truncated token ids)."""
        texts = [row.text for row in rows]
        ids = self.model.tokenize(texts, self.config.instruction, self.limit + 1, rows[0].number)
        return (rows, sum(len(text) > self.limit for text in ids)), [text[: self.limit] for text in ids]

    def _raise_not_finite(self, tag: tuple[list[Row], int], number: int) -> NoReturn:
        row = tag[0][number]
        id_ = "" if row.id == row.number else f" of id {row.id!r}"
        name = f"input={self.config.input}: text {row.number} (from 0){id_}, {quote(row.text)}"
        raise not_finite(name, self.model.backbone.dtype)

    def _write(self, journal: JsonlAppender, parts: Sequence[tuple[Any, ...]]) -> None:
        """Writes a shard and its entry in the journal."""
        rows = [row for part in parts for row in part[0]]
        number, digest = rows[0].number // self.size, hashlib.sha256()
        for row in rows:
            _update(digest, row)
        path = self.files.shard(number)
        with atomic_path(path) as temporary:
            shards.write_shard(temporary, [row.id for row in rows], np.concatenate([part[1] for part in parts]))
            self.sizes[path] = temporary.stat().st_size
        entry: dict[str, Any] = {"shard": number, "file": path.name, "rows": [rows[0].number, rows[-1].number + 1]}
        entry |= {"sha256": sha256_file(path), "texts_sha256": digest.hexdigest()}
        entry |= {"cut": sum(part[3] for part in parts), "empty": sum(not row.text.strip() for row in rows)}
        if self.config.save_soft_prompts:
            path = self.files.soft_prompts(number)
            with atomic_path(path) as temporary:
                np.save(temporary, np.concatenate([part[2] for part in parts]))
                self.sizes[path] = temporary.stat().st_size
            entry |= {"soft_prompts": path.name, "soft_prompts_sha256": sha256_file(path)}
        if self.config.precision == "int8":
            entry |= {"ranges": self.files.ranges.name, "ranges_sha256": sha256_file(self.files.ranges)}
        journal.append([entry])
        self.done[number] = entry

    def _write_ranges(self, rows: list[Row]) -> None:
        """Writes the int8 ranges (2, E) of the first texts, which are the same in all shares."""
        with progress.bar(len(rows), "text", "int8 ranges") as bar:
            [(_, embeddings, _)] = self._encode_windows([self._tokenize(rows)], False, bar)
        ranges = postprocess.ranges_of(postprocess.finish(embeddings, self.config.truncate_dim, self.config.normalize))
        with atomic_path(self.files.ranges) as temporary:
            np.save(temporary, ranges)

    def _manifest(self) -> dict[str, Any]:
        shards = [self.done[number] for number in sorted(self.done)]
        if shards and shards[-1]["rows"][1] > self.corpus.rows:
            raise InputError(
                f"input={self.config.input}: has fewer texts than {self.files.output}. Choose another output"
            )
        dimension = self.config.truncate_dim or self.model.get_embedding_dimension()
        manifest = {**self.record, "rows": self.corpus.rows, "dimension": dimension, "shards": shards}
        if self.config.precision == "int8":
            manifest["ranges"] = {"file": self.files.ranges.name, "sha256": sha256_file(self.files.ranges)}
        return manifest


def _update(digest: Any, row: Row) -> None:
    """Adds a row to a hash, unambiguously."""
    text = row.text.encode()
    digest.update(f"{row.id} {len(text)} ".encode() + text)
