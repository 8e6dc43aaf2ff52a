"""Training, encoding and generation of real shapes, compiled by the devices' own compilers: memory that is kept.

What the compilers say is kept in accelerator_figures.json; more than 5 % more fails. Slow. For TPUs it needs libtpu in
a folder of its own, because where JAX finds it installed it looks for the chips as well:

    pip install -r requirements-gpu-compiler.txt
    pip install --target .cache/libtpu --no-deps libtpu==0.0.42.1
    python -m pytest -m slow tests/planning/test_figures.py
    python -m tests.planning.test_figures                     # writes accelerator_figures.json anew
"""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LIBTPU = pathlib.Path(os.environ.get("LLM2VEC_GEN_LIBTPU", ROOT / ".cache" / "libtpu"))
FIGURES = pathlib.Path(__file__).with_name("accelerator_figures.json")
CASES = {
    "qwen3-8b, h100:1": ("qwen3-8b", "topology=h100:1"),
    "qwen3-8b, h100:8": ("qwen3-8b", "topology=h100:8", "mesh.data=1", "mesh.fsdp=8", "train.batch_size=64"),
    "qwen3-8b, h100:8, tensor": ("qwen3-8b", "topology=h100:8", "mesh.data=4", "mesh.tensor=2", "train.batch_size=64"),
    "llama3.1-8b, a100:8": ("llama3.1-8b", "topology=a100:8", "mesh.data=1", "mesh.fsdp=8", "train.batch_size=64"),
    "qwen3-8b, l4:1, int8": ("qwen3-8b", "topology=l4:1", "backbone.dtype=int8", "train.batch_size=8"),
    "qwen3-8b, v5e:4x4": ("qwen3-8b", "topology=v5e:4x4", "mesh.data=4", "mesh.fsdp=4", "train.batch_size=64"),
    "llama3-70b, v5p:2x2x2": ("llama3-70b", "topology=v5p:2x2x2", "mesh.fsdp=4", "mesh.tensor=2"),
}
KEPT = ("weights", "state", "train", "encode", "generate", "moved")


def is_tpu(case):
    return "topology=v" in " ".join(CASES[case])


def measure(shape, *words):
    """Returns what `launch.plan` says of a case."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "launch.plan", f"architecture=configs/architectures/{shape}.json", *words]
        command += ["train.remat=block", f"output={output}"]
        paths = os.pathsep.join([str(ROOT), str(LIBTPU)])
        environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(output.read_text())


def versions(case):
    """The versions that a case's figures are of."""
    libtpu = [path.name.split("-")[1].removesuffix(".dist") for path in LIBTPU.glob("libtpu-*.dist-info")]
    if is_tpu(case):
        compiler = libtpu[0] if libtpu else None
    else:
        try:
            compiler = importlib.metadata.version("jax-cuda13-plugin")
        except importlib.metadata.PackageNotFoundError:
            compiler = None
    return {"jax": importlib.metadata.version("jax"), "compiler": compiler}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_device_holds_no_more_than_it_did(case):
    figures = json.loads(FIGURES.read_text())[case]
    if versions(case) != figures["versions"]:
        pytest.skip(f"the figures are of {figures['versions']}, here is {versions(case)}: see the head of this file")
    row = measure(*CASES[case])
    assert row["fits"]
    more = {key: (row[key], figures[key]) for key in KEPT if row[key] > 1.05 * figures[key]}
    assert not more


if __name__ == "__main__":
    figures = json.loads(FIGURES.read_text())
    for case in sys.argv[1:] or CASES:
        row = measure(*CASES[case])
        figures[case] = {"versions": versions(case)} | {key: row[key] for key in KEPT}
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
