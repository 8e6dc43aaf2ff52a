"""Checks that a model directory means the same in JAX and in PyTorch: encodes and decodes with both, and compares."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import tempfile
import unicodedata

import jax
import numpy as np
import yaml

from llm2vec_gen_jax import api, config
from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import write_json
from llm2vec_gen_jax.inference.generate import Sampling, generate_from_soft_prompts
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained import export, model_directory
from llm2vec_gen_jax.pretrained.backbone import resolve_path

SCRIPT = pathlib.Path(__file__).with_name("pytorch_encode.py")
PACKAGES = ("torch", "transformers", "peft")  # of the Python that runs it
TEXTS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "x",
    "",
    "  two leading spaces, and two trailing  ",
    "emoji 🙂👍🏽, accents éü, digits 1234567",
    "法国的首都是哪里？",
    "a text of more than 512 tokens, which is cut: " + "the river rises in the hills and reaches the sea; " * 60,
)
BATCHES = (TEXTS[:-1], TEXTS[-1:])  # padding beside each other, but not to the longest
DECODED = 2  # of them
MAX_LENGTH = 512
# (least cosine, largest difference of embeddings, relative to the largest value above what) by dtype. A soft
# prompt may differ by three times as much, relative above 1: it is one state, where an embedding is the mean of ten,
# and that of an empty text rounds the most.
LIMITS = {"float32": (0.99999, 1e-4, 1.0), "bfloat16": (0.999, 0.05, 0.0), "float16": (0.9995, 0.01, 0.0)}


@dataclasses.dataclass
class Report:
    """What was compared, a row per text; reader: the PyTorch packages.

    missing: the packages without which nothing could be compared; then a row only says whether its numbers are finite.
    """

    rows: list[dict]
    dtype: str
    reader: list[str]
    decoded_equal: bool
    missing: list[str] = dataclasses.field(default_factory=list)

    @property
    def passed(self):
        """Whether every text was compared and is within the limits of the dtype."""
        return self.verdict == "PASS"

    @property
    def verdict(self):
        """PASS, FAIL or NOT COMPARED: a number that is not finite fails whatever is missing."""
        exact = self.dtype == "float32"
        if not (all(row["ok"] for row in self.rows) and (self.decoded_equal or not exact)):
            return "FAIL"
        return "NOT COMPARED" if self.missing else "PASS"

    def __str__(self):
        cosine, difference, above = LIMITS[self.dtype]
        lines = [f"{'text':<42} {'cosine':>10} {'embedding':>10} {'soft prompts':>13} {'decoded':>9}"]
        for row in self.rows:
            numbers = " ".join(f"{row[key]:>{width}}" for key, width in _COLUMNS.items())
            lines.append(f"{row['text']} {numbers}  {'' if row['ok'] else '<-- differs'}".rstrip())
        unit = "of the largest value" + " where that is above 1" * bool(above)
        lines.append(f"limits in {self.dtype}: cosine {cosine}, largest difference {difference} {unit}")
        if self.missing:
            lines.append(
                f"missing: {', '.join(self.missing)}; only this side was read. Install with "
                f"`pip install {' '.join(self.missing)}`, or name a Python that has it: python=PATH"
            )
        else:
            lines.append(f"read by {', '.join(self.reader)}")
        return "\n".join([*lines, self.verdict])


_COLUMNS = {"cosine": 10, "embedding": 10, "soft_prompts": 13, "decoded": 9}


def verify(path, python, backbone=None, max_new_tokens=16):
    """Returns the Report on a model directory.

    python: interpreter of an environment with torch, transformers and peft, and the published package if that is to
    read the directory. backbone: where it is, if not where the directory says.
    Raises InputError when the directory cannot be read here, or PyTorch fails on it.
    """
    record = model_directory.read_model_directory(str(path))
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    embedder = api.LLM2VecGen.from_pretrained(path, record.dtype, backbone, mesh)
    parts = [embedder.encode(list(texts), max_length=MAX_LENGTH, return_soft_prompts=True) for texts in BATCHES]
    embeddings, soft_prompts = (np.concatenate(part) for part in zip(*parts))
    ids = generate_from_soft_prompts(embedder.backbone, soft_prompts[:DECODED], Sampling(max_new_tokens))
    if missing := missing_packages(python):
        ok = np.isfinite(embeddings).all(axis=1) & np.isfinite(soft_prompts).all(axis=(1, 2))
        rows = [{"text": _short(text), "ok": fine, **dict.fromkeys(_COLUMNS, "")} for text, fine in zip(TEXTS, ok)]
        return Report(rows, record.dtype, [], True, missing)
    with locks.temporary(pathlib.Path(tempfile.gettempdir(), "llm2vec-gen-verify"), folder=True) as folder:
        theirs, reader = _read_with_pytorch(folder, path, embedder, python, max_new_tokens)
    stop = set(embedder.backbone.tokenizer.stop_ids)
    rows, equal = [], True
    for row, text in enumerate(TEXTS):
        values = _compare(embeddings[row], theirs["embeddings"][row], soft_prompts[row], theirs["soft_prompts"][row])
        ok = _within(values, LIMITS[record.dtype])
        decoded = ""
        if row < DECODED:
            their_ids = theirs[f"ids_{row}"].tolist()
            end = next((n for n, id_ in enumerate(their_ids) if id_ in stop), len(their_ids))
            decoded = "equal" if their_ids[:end] == ids[row] else "differs"
            equal &= decoded == "equal"
        shown = {"cosine": f"{values['cosine']:.7f}"}
        shown |= {name: f"{values[name]:.1e}" for name in ("embedding", "soft_prompts")}
        rows.append({"text": _short(text), "ok": ok, "decoded": decoded, **shown})
    return Report(rows, record.dtype, reader, equal)


def missing_packages(python):
    """Returns which packages that the reading script needs a Python does not have."""
    code = (
        f"import importlib.util as u, json; print(json.dumps([name for name in {PACKAGES} if not u.find_spec(name)]))"
    )
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if result.returncode:
            return list(PACKAGES)
        return json.loads(result.stdout.strip().splitlines()[-1])
    except OSError as error:
        raise InputError(f"python={python}: {error.strerror}") from None
    except (ValueError, IndexError):
        raise InputError(f"python={python}: is no Python (it does not print what it is told to)") from None


def _read_with_pytorch(folder, path, embedder, python, max_new_tokens):
    """Returns (arrays of the script, versions). The directory is read as it is, in a copy of a few MB whose
    run_config.yml names a backbone that PyTorch can load."""
    copy = folder / "model"
    source = model_directory.local_folder(str(path))
    shutil.copytree(source, copy)
    run_config = copy / "run_config.yml"
    if not run_config.exists():
        shutil.copy(source.resolve().parent / "run_config.yml", run_config)
    where = resolve_path(embedder.backbone.name)
    if where.suffix == ".gguf":
        where = folder / "backbone"
        export.save_backbone(embedder.backbone, where)
    with open(run_config, "a", encoding="utf-8") as file:  # the last of a repeated key holds
        file.write("\n" + yaml.safe_dump({"model_name_or_path": str(where.resolve())}))
    request = {"batches": BATCHES, "decode": DECODED, "max_length": MAX_LENGTH, "max_new_tokens": max_new_tokens}
    write_json(folder / "request.json", request)
    command = [python, SCRIPT, copy, folder / "request.json", folder / "out.npz"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"{path}: PyTorch ({python}) cannot read it: {reason}")
    with np.load(folder / "out.npz") as arrays:
        return dict(arrays), json.loads(result.stdout.strip().splitlines()[-1])


def _compare(ours, theirs, our_prompts, their_prompts):
    if ours.shape != theirs.shape or our_prompts.shape != their_prompts.shape:
        return {"cosine": -1.0, "embedding": np.inf, "soft_prompts": np.inf, "largest": (1.0, 1.0)}
    cosine = float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))
    return {
        "cosine": cosine,
        "embedding": float(np.abs(ours - theirs).max()),
        "soft_prompts": float(np.abs(our_prompts - their_prompts).max()),
        "largest": (float(np.abs(theirs).max()), float(np.abs(their_prompts).max())),
    }


def _within(values, limits):
    cosine, difference, above = limits
    embedding, soft_prompts = values["largest"]
    return bool(
        values["cosine"] >= cosine
        and values["embedding"] <= difference * max(embedding, above)
        and values["soft_prompts"] <= 3 * difference * max(soft_prompts, 1.0)
    )


def _short(text, width=42):
    """Returns a text cut and padded to columns of a terminal."""
    line, room = "", width - 1
    for char in repr(text):
        # Wide characters take two columns; those that change the one before take none.
        columns = 0 if unicodedata.category(char) in ("Mn", "Sk") else 1 + (unicodedata.east_asian_width(char) in "WF")
        if columns > room:
            return line[:-1] + "…" + " " * (room + 1)
        line, room = line + char, room - columns
    return line + " " * (room + 1)
