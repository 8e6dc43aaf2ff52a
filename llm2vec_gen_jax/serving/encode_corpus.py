"""The encode command's work: any number of texts to shards of vectors on disk, resumable, a share for each process."""

import contextlib
import hashlib
import itertools
import pathlib
import re

import jax
import numpy as np

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.common import locks, progress
from llm2vec_gen_jax.common.errors import InputError, not_finite, quote
from llm2vec_gen_jax.common.files import atomic_path, diff, read_array, read_json, removed, sha256_file, write_json
from llm2vec_gen_jax.common.jsonl import JsonlAppender
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.data.texts import Corpus
from llm2vec_gen_jax.inference import postprocess, shards
from llm2vec_gen_jax.inference.encode import WINDOW
from llm2vec_gen_jax.parallel import sharding

CALIBRATION = 1024  # texts whose vectors give the ranges of int8


def encode_corpus(path, config, check=lambda: None):
    """Writes the vectors of an EncodeConfig with the model at `path`, as its docstring says. Returns the manifest.

    check: called now and then; what it raises ends the work, which a repeated call goes on with.

    A shard is its texts alone: which texts share a pass, and so every bit of its vectors, follows from their lengths.
    Raises InputError for bad input, and where the output holds another run, naming the difference.
    """
    options.require(config, "input", "output")
    share = config.shard
    if not 0 <= share.index < share.count:
        raise InputError(f"shard.index={share.index} must be within 0 and shard.count - 1 = {share.count - 1}")
    output = pathlib.Path(config.output)
    files = _Files(output, config)
    with locks.locked(files.share, "output"):  # what cannot be written fails before the work, not after it
        return _encode_corpus(path, config, files, check)


def _encode_corpus(path, config, files, check):
    corpus = Corpus(config.input, config.field, config.id_field, config.stdin, check)
    files.check()
    identity = corpus.identity()
    mesh = sharding.make_mesh(config.mesh, jax.local_devices())
    model = LLM2VecGen.from_pretrained(path, config.dtype, mesh=mesh, attention=config.kernels.attention)
    job = _Job(model, corpus, config, files, _run_record(model, identity, config), check)
    return job.finished_manifest() or job.run()


def _run_record(model, identity, config):
    """What the bytes of the output follow from; a run is continued only with the same."""
    settings = options.to_dict(config)
    for key in ("input", "output", "warmup", "shard", *vars(config_lib.DistributedConfig())):
        del settings[key]
    settings["dtype"] = model.backbone.dtype
    settings["mesh"] = dict(model.backbone.mesh.shape)
    return {
        "model": {"identity": model.identity, "backbone": model.backbone.identity},
        "input": identity,
        "config": settings,
        "shard": options.to_dict(config.shard),
    }


class _Files:
    """The names of what one share writes into the output folder."""

    def __init__(self, output, config):
        self.output, self.config = output, config
        index, count = config.shard.index, config.shard.count
        suffix = "" if count == 1 else f"-{index:05}-of-{count:05}"
        self.share = output.with_name(f"{output.name}{suffix}")  # what is locked: shares do not wait for one another
        self.manifest = output / f"manifest{suffix}.json"
        self.journal = output / f"progress{suffix}.jsonl"
        self.journal_record, self.journal_sums = JsonlAppender.sidecars(self.journal)
        self.ranges = output / "ranges.npy"

    def shard(self, number):
        return self.output / f"embeddings-{number:05}.{self.config.format}"

    def soft_prompts(self, number):
        return self.output / f"soft_prompts-{number:05}.npy"

    def check(self):
        """Raises InputError where the output is a file, or a folder that encode did not begin."""
        ours = re.compile(r"\.?(manifest|progress|embeddings|soft_prompts|ranges)\b")
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"output={self.output}: exists and is not a folder")
        if self.output.is_dir() and any(not ours.match(path.name) for path in self.output.iterdir()):
            raise InputError(f"output={self.output}: exists and holds other files. Choose another, or remove it")
        for path in self.output.glob("[mp]*.json*"):
            share = re.match(r"(?:manifest|progress)(?:-\d+-of-(\d+))?\.json", path.name)
            count = int(share[1] or 1) if share else self.config.shard.count
            if count != self.config.shard.count:
                raise InputError(
                    f"output={self.output}: exists and holds another run (shard.count: {count} -> "
                    f"{self.config.shard.count}). Repeat its settings to go on with it, or choose another output"
                )

    def remove_if_empty(self):
        """Removes the folder when it holds no more than ranges."""
        if self.output.exists() and {path.name for path in self.output.iterdir()} <= {self.ranges.name}:
            self.ranges.unlink(missing_ok=True)
            self.output.rmdir()

    def remove_torn(self):
        """Removes what a kill left of this share's unfinished writes."""
        for path in self.output.glob(".*"):
            shard = re.match(r"\.(?:embeddings|soft_prompts)-(\d+)\.", path.name)
            mine = int(shard[1]) % self.config.shard.count == self.config.shard.index if shard else False
            if mine or path.name.startswith((f".{self.manifest.name}.", f".{self.journal.name}.", ".ranges.")):
                locks.remove_unlocked(path)


class _Job:
    """One share of an encode command. record: see _run_record."""

    def __init__(self, model, corpus, config, files, record, check):
        self.model, self.corpus, self.config, self.files, self.record = model, corpus, config, files, record
        self.check, self.sizes = check, {}
        self.size, self.share = config.shard_size, config.shard
        self.limit = model.text_length(config.max_length)
        if config.truncate_dim is not None and config.truncate_dim > model.get_embedding_dimension():
            raise InputError(f"truncate_dim={config.truncate_dim}: the vectors have {model.get_embedding_dimension()}")

    def finished_manifest(self):
        """Returns the manifest of a finished run, or None. Raises InputError when the output is of another run."""
        files, record = self.files, None
        if files.manifest.exists():
            manifest = shards.read_manifest(files.manifest)
            record = {key: manifest.get(key) for key in self.record}
        elif files.journal.exists() and files.journal_record.exists():
            record = read_json(files.journal_record)
        if record is not None and (differing := diff(record, self.record)):
            raise InputError(
                f"output={files.output}: exists and holds another run ({differing}). Repeat its settings to go on "
                "with it, choose another output, or remove it"
            )
        if not files.manifest.exists():
            return None
        if self.corpus.streamed:
            raise InputError(f"output={files.output}: exists and is complete. Choose another, or remove it")
        whole = self._whole(manifest["shards"])
        if len(whole) < len(manifest["shards"]):  # then it is as if the run had not come to its end
            with JsonlAppender(files.journal, self.record, overwrite=True) as journal:
                journal.append(whole)
            files.manifest.unlink()
            return None
        for path in (files.journal, files.journal_record, files.journal_sums):
            path.unlink(missing_ok=True)  # what a kill at the very end left
        files.remove_torn()
        return manifest

    def run(self):
        """Encodes what is not there yet; returns the manifest."""
        with JsonlAppender(self.files.journal, self.record) as journal:
            self.files.remove_torn()
            self.done = {row["shard"]: row for row in self._whole(journal.rows)}
            try:
                self.files.check()  # again: another run that divides the texts otherwise may have begun meanwhile
                self._encode(journal)
                manifest = self._manifest()
                journal.check()
                self._require_files()
                write_json(self.files.manifest, manifest)
                journal.remove()
            finally:
                if not self.done:  # an error in the first texts leaves nothing behind
                    journal.remove()
                    self.files.remove_if_empty()
        return manifest

    def _require_files(self):
        """Raises OSError where a file of this share is not as long as it was when it was written or checked."""
        for path, size in self.sizes.items():
            if not path.is_file() or path.stat().st_size != size:
                raise removed(path)

    def _whole(self, entries):
        """Returns the entries of a journal or manifest whose files are what was written."""
        whole = []
        with progress.bar(len(entries), "shard", "check", enabled=bool(entries)) as bar:
            for entry in entries:
                whole += [entry] if self._is_whole(entry) else []
                bar.update(1)
        return whole

    def _is_whole(self, entry):
        if not shards.is_shard(entry) or entry["file"] != self.files.shard(entry["shard"]).name:
            print(f"{self.files.output}: a shard is not noted as it was written; made again", flush=True)
            return False
        digests = {"file": "sha256", "soft_prompts": "soft_prompts_sha256", "ranges": "ranges_sha256"}
        for name, digest in digests.items():
            path = self.files.output / entry.get(name, "")
            if name in entry and not (path.is_file() and sha256_file(path) == entry.get(digest)):
                print(f"{path}: missing, or not what was written; made again", flush=True)
                return False
            if name in entry:
                self.sizes[path] = path.stat().st_size
        return True

    def _mine(self, shard):
        return shard % self.share.count == self.share.index

    def _encode(self, journal):
        config = self.config
        if config.warmup:
            self.model.warmup(config.batch_size, config.max_length, config.save_soft_prompts)
        calibrate = config.precision == "int8" and not (self.done and self.files.ranges.exists())

        def wanted(first, count):
            shards = range(first // self.size, (first + count - 1) // self.size + 1)
            mine = any(self._mine(shard) and (self.corpus.streamed or shard not in self.done) for shard in shards)
            return mine or (calibrate and first < CALIBRATION)

        texts, ranges = self.corpus.read(wanted), None
        if calibrate:
            head = list(itertools.islice(texts, CALIBRATION))
            self._write_ranges(head)
            texts = itertools.chain(head, texts)
        if config.precision == "int8":
            ranges = read_array(self.files.ranges, "ranges")
        count = self.corpus.count()
        numbers = range(self.share.index, -(-(count or 0) // self.size), self.share.count)
        total = count and sum(min(self.size, count - number * self.size) for number in numbers)
        already = sum(row["rows"][1] - row["rows"][0] for row in self.done.values())
        parts = []
        with progress.bar(total, "text", "encode", initial=already) as bar:
            more = config.batch_size, config.save_soft_prompts, bar, self._refuse
            stream = self.model.encode_windows(self._windows(texts), *more)
            with contextlib.closing(stream):  # an interruption ends its thread
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

    def _windows(self, texts):
        """Yields `_tokenize` of consecutive rows of one shard that is to be written."""
        done, window = {shard: hashlib.sha256() for shard in self.done}, []
        for row in texts:
            shard = row.number // self.size
            if shard in done and self.corpus.streamed:
                self._compare(done[shard], shard, row)
            if shard in done or not self._mine(shard):
                continue
            if window and (len(window) == WINDOW or window[0].number // self.size != shard):
                yield self._tokenize(window)
                window = []
            window.append(row)
        if window:
            yield self._tokenize(window)

    def _compare(self, digest, shard, row):
        """Raises InputError where standard input is not what a finished shard was made of."""
        _update(digest, row)
        first, end = self.done[shard]["rows"]
        if row.number >= end or (row.number == end - 1 and digest.hexdigest() != self.done[shard]["texts_sha256"]):
            raise InputError(
                f"standard input: texts {first} to {end} are not those that {self.files.output} was begun with. "
                "Give the same input, or choose another output"
            )

    def _tokenize(self, rows):
        """Returns ((rows, how many of their texts are too long), their ids, cut)."""
        texts = [row.text for row in rows]
        ids = self.model.tokenize(texts, self.config.instruction, self.limit + 1, rows[0].number)
        return (rows, sum(len(text) > self.limit for text in ids)), [text[: self.limit] for text in ids]

    def _refuse(self, tag, number):
        row = tag[0][number]
        id_ = "" if row.id == row.number else f" of id {row.id!r}"
        name = f"input={self.config.input}: text {row.number} (from 0){id_}, {quote(row.text)}"
        raise not_finite(name, self.model.backbone.dtype)

    def _write(self, journal, parts):
        """Writes a shard and notes it in the journal."""
        rows = [row for part in parts for row in part[0]]
        number, digest = rows[0].number // self.size, hashlib.sha256()
        for row in rows:
            _update(digest, row)
        path = self.files.shard(number)
        with atomic_path(path) as temporary:
            shards.write_shard(temporary, [row.id for row in rows], np.concatenate([part[1] for part in parts]))
            self.sizes[path] = temporary.stat().st_size
        entry = {"shard": number, "file": path.name, "rows": [rows[0].number, rows[-1].number + 1]}
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

    def _write_ranges(self, rows):
        """Writes the int8 ranges (2, E) of the first texts; every share comes to the same."""
        with progress.bar(len(rows), "text", "int8 ranges") as bar:
            windows = [self._tokenize(rows)]
            more = self.config.batch_size, False, bar, self._refuse
            [(_, embeddings, _)] = self.model.encode_windows(windows, *more)
        ranges = postprocess.ranges_of(postprocess.finish(embeddings, self.config.truncate_dim, self.config.normalize))
        with atomic_path(self.files.ranges) as temporary:
            np.save(temporary, ranges)

    def _manifest(self):
        shards = [self.done[number] for number in sorted(self.done)]
        if shards and shards[-1]["rows"][1] > self.corpus.rows:
            raise InputError(f"input={self.config.input}: has fewer texts than {self.files.output} was begun with")
        dimension = self.config.truncate_dim or self.model.get_embedding_dimension()
        manifest = {**self.record, "rows": self.corpus.rows, "dimension": dimension, "shards": shards}
        if self.config.precision == "int8":
            manifest["ranges"] = {"file": self.files.ranges.name, "sha256": sha256_file(self.files.ranges)}
        return manifest


def _update(digest, row):
    """Adds a row to a hash so that no other rows give the same."""
    text = row.text.encode()
    digest.update(f"{row.id} {len(text)} ".encode() + text)
