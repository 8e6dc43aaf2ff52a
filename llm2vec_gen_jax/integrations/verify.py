"""Verifies a model directory: compares embeddings and decoded text between JAX and PyTorch."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from llm2vec_gen_jax import api, config
from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import write_json
from llm2vec_gen_jax.common.hub import DEFAULT_HUB, HubOptions
from llm2vec_gen_jax.common.yaml_files import to_yaml
from llm2vec_gen_jax.inference.generate import Sampling, generate_from_soft_prompts
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained import export, model_directory
from llm2vec_gen_jax.pretrained.backbone import resolve_path

SCRIPT = pathlib.Path(__file__).with_name("pytorch_encode.py")
PACKAGES = ("torch", "transformers", "peft")  # required by SCRIPT
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
BATCHES = (TEXTS[:-1], TEXTS[-1:])  # the first has padding, but not to the longest text
DECODED = 2  # number of decoded texts
MAX_LENGTH = 512
# dtype -> (least cosine, largest difference between embeddings, the least value to which it is relative). Soft prompts
# may differ by three times as much, relative to at least 1: embeddings are means over soft prompts, which reduces
# rounding errors; those of an empty text are the largest.
LIMITS = {"float32": (0.99999, 1e-4, 1.0), "bfloat16": (0.999, 0.05, 0.0), "float16": (0.9995, 0.01, 0.0)}


@dataclasses.dataclass
class Report:
    """Results of the comparison, one row per text. reader: versions of the PyTorch packages.

    missing: required packages that are not installed; the rows then only say whether the JAX values are finite.
    """

    rows: list[dict[str, Any]]
    dtype: str
    reader: list[str]
    decoded_equal: bool
    missing: list[str] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether all texts were compared and are within the limits of the dtype."""
        return self.verdict == "PASS"

    @property
    def verdict(self) -> str:
        """PASS, FAIL or NOT COMPARED. Values that are not finite fail even if packages are missing."""
        exact = self.dtype == "float32"
        if not (all(row["ok"] for row in self.rows) and (self.decoded_equal or not exact)):
            return "FAIL"
        return "NOT COMPARED" if self.missing else "PASS"

    def __str__(self) -> str:
        cosine, difference, above = LIMITS[self.dtype]
        lines = [f"{'text':<32} {'cosine':>10} {'embedding':>10} {'soft prompts':>13} {'decoded':>9}"]
        for row in self.rows:
            values = " ".join(f"{row[key]:>{width}}" for key, width in _COLUMNS.items())
            lines.append(f"{row['text']} {values}  {'' if row['ok'] else '<-- differs'}".rstrip())
        unit = "of the largest value" + " where that is above 1" * bool(above)
        lines.append(f"limits in {self.dtype}: cosine {cosine}, largest difference {difference} {unit}")
        if self.missing:
            lines.append(
                f"missing: {', '.join(self.missing)}; PyTorch was not compared. Install with "
                f"`pip install {' '.join(self.missing)}`, or pass the Python of another environment: python=PATH"
            )
        else:
            lines.append(f"read by {', '.join(self.reader)}")
        return "\n".join([*lines, self.verdict])


_COLUMNS = {"cosine": 10, "embedding": 10, "soft_prompts": 13, "decoded": 9}


def verify(
    path: str | pathlib.Path,
    python: str | pathlib.Path,
    backbone: str | pathlib.Path | None = None,
    max_new_tokens: int = 16,
    hub: HubOptions = DEFAULT_HUB,
) -> Report:
    """Compares a model directory between JAX and PyTorch.

    python: interpreter of an environment with torch, transformers and peft, and optionally the published package, which
    is then used. backbone: its location, by default the one recorded in the directory. hub: of a `path` on the hub.
    Raises InputError if the directory cannot be read in JAX or in PyTorch.
    """
    record = model_directory.read_model_directory(str(path), hub)
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    embedder = api.LLM2VecGen.from_pretrained(path, record.dtype, backbone, mesh, **vars(hub))
    parts = [embedder.encode(list(texts), max_length=MAX_LENGTH, return_soft_prompts=True) for texts in BATCHES]
    embeddings, soft_prompts = (np.concatenate(part) for part in zip(*parts))
    ids = generate_from_soft_prompts(embedder.backbone, soft_prompts[:DECODED], Sampling(max_new_tokens))
    if missing := missing_packages(python):
        ok = np.isfinite(embeddings).all(axis=1) & np.isfinite(soft_prompts).all(axis=(1, 2))
        rows = [{"text": _fit(text), "ok": valid, **dict.fromkeys(_COLUMNS, "")} for text, valid in zip(TEXTS, ok)]
        return Report(rows, record.dtype, [], True, missing)
    with locks.temporary(pathlib.Path(tempfile.gettempdir(), "llm2vec-gen-verify"), folder=True) as folder:
        pytorch, reader = _run_pytorch(folder, path, embedder, python, max_new_tokens, hub)
    stop = set(embedder.backbone.tokenizer.stop_ids)
    rows, equal = [], True
    for row, text in enumerate(TEXTS):
        values = _compare(embeddings[row], pytorch["embeddings"][row], soft_prompts[row], pytorch["soft_prompts"][row])
        ok = _within(values, LIMITS[record.dtype])
        decoded = ""
        if row < DECODED:
            pytorch_ids = pytorch[f"ids_{row}"].tolist()
            end = next((n for n, id_ in enumerate(pytorch_ids) if id_ in stop), len(pytorch_ids))
            decoded = "equal" if pytorch_ids[:end] == ids[row] else "differs"
            equal &= decoded == "equal"
        cells = {"cosine": f"{values['cosine']:.7f}"}
        cells |= {name: f"{values[name]:.1e}" for name in ("embedding", "soft_prompts")}
        rows.append({"text": _fit(text), "ok": ok, "decoded": decoded, **cells})
    return Report(rows, record.dtype, reader, equal)


def missing_packages(python: str | pathlib.Path) -> list[str]:
    """Returns the packages of PACKAGES that are not installed for a Python interpreter."""
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
        raise InputError(f"python={python}: not a Python interpreter") from None


def _run_pytorch(
    folder: pathlib.Path,
    path: str | pathlib.Path,
    embedder: api.LLM2VecGen,
    python: str | pathlib.Path,
    max_new_tokens: int,
    hub: HubOptions,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns (arrays of SCRIPT, package versions).

    The script reads a copy of the directory, whose run_config.yml names a backbone that PyTorch can load.
    """
    copy = folder / "model"
    source = model_directory.local_folder(str(path), hub)
    shutil.copytree(source, copy)
    run_config = copy / "run_config.yml"
    if not run_config.exists():
        shutil.copy(source.resolve().parent / "run_config.yml", run_config)
    where = resolve_path(embedder.backbone.name, dataclasses.replace(hub, revision=embedder.backbone.revision))
    if where.suffix == ".gguf":
        where = folder / "backbone"
        export.save_backbone(embedder.backbone, where)
    with open(run_config, "a", encoding="utf-8") as file:  # the last value of a repeated key is used
        file.write("\n" + to_yaml({"model_name_or_path": str(where.resolve())}))
    request = {"batches": BATCHES, "decode": DECODED, "max_length": MAX_LENGTH, "max_new_tokens": max_new_tokens}
    write_json(folder / "request.json", request)
    command = [python, SCRIPT, copy, folder / "request.json", folder / "out.npz"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"{path}: PyTorch ({python}) cannot read it: {reason}")
    with np.load(folder / "out.npz") as arrays:
        return dict(arrays), json.loads(result.stdout.strip().splitlines()[-1])


def _compare(
    jax_embedding: np.ndarray, torch_embedding: np.ndarray, jax_prompts: np.ndarray, torch_prompts: np.ndarray
) -> dict[str, Any]:
    if jax_embedding.shape != torch_embedding.shape or jax_prompts.shape != torch_prompts.shape:
        return {"cosine": -1.0, "embedding": np.inf, "soft_prompts": np.inf, "largest": (1.0, 1.0)}
    norms = np.linalg.norm(jax_embedding) * np.linalg.norm(torch_embedding)
    return {
        "cosine": float(jax_embedding @ torch_embedding / norms),
        "embedding": float(np.abs(jax_embedding - torch_embedding).max()),
        "soft_prompts": float(np.abs(jax_prompts - torch_prompts).max()),
        "largest": (float(np.abs(torch_embedding).max()), float(np.abs(torch_prompts).max())),
    }


def _within(values: Mapping[str, Any], limits: tuple[float, float, float]) -> bool:
    cosine, difference, above = limits
    embedding, soft_prompts = values["largest"]
    return bool(
        values["cosine"] >= cosine
        and values["embedding"] <= difference * max(embedding, above)
        and values["soft_prompts"] <= 3 * difference * max(soft_prompts, 1.0)
    )


def _fit(text: str, width: int = 32) -> str:
    """Returns the repr of a text, truncated or padded to `width` columns of a terminal."""
    line, remaining = "", width - 1
    for char in repr(text):
        # Wide characters take two columns, combining characters and modifiers none.
        columns = 0 if unicodedata.category(char) in ("Mn", "Sk") else 1 + (unicodedata.east_asian_width(char) in "WF")
        if columns > remaining:
            return line[:-1] + "…" + " " * (remaining + 1)
        line, remaining = line + char, remaining - columns
    return line + " " * (remaining + 1)
