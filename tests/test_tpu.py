"""Training, encoding and generation of real shapes, compiled by the real TPU compiler for chips that are not here.

What it says of memory and FLOPs is kept in tpu_figures.json; more than 5 % more fails. Slow, and it needs libtpu in a
folder of its own, because where JAX finds it installed it looks for the chips as well:

    pip install --target .cache/libtpu --no-deps libtpu==0.0.42.1
    python -m pytest -m slow tests/test_tpu.py
    python -m tests.test_tpu                            # writes tpu_figures.json anew
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
LIBTPU = pathlib.Path(os.environ.get("LLM2VEC_GEN_LIBTPU", ROOT / ".cache" / "libtpu"))
FIGURES = pathlib.Path(__file__).with_name("tpu_figures.json")
CASES = {
    "qwen3-8b, v5e:4x4": ("qwen3-8b", "topology=v5e:4x4", "mesh.data=4", "mesh.fsdp=4", "train.batch_size=64"),
    "llama3-70b, v5p:2x2x2": ("llama3-70b", "topology=v5p:2x2x2", "mesh.fsdp=4", "mesh.tensor=2"),
}
KEPT = ("weights", "state", "train", "encode", "generate", "moved", "compiled_flops")


def measure(shape, *words):
    """Returns what `launch.plan` says of a case, compiled with splash attention."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "launch.plan", f"architecture=configs/architectures/{shape}.json", *words]
        command += ["train.remat=block", "kernels.attention=pallas", f"output={output}"]
        paths = os.pathsep.join([str(ROOT), str(LIBTPU)])
        environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(output.read_text())


def versions():
    found = [path.name.split("-")[1].removesuffix(".dist") for path in LIBTPU.glob("libtpu-*.dist-info")]
    return {"jax": jax.__version__, "libtpu": found[0] if found else None}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_tpu_takes_no_more_than_it_did(case):
    figures = json.loads(FIGURES.read_text())
    if versions() != figures["versions"]:
        pytest.skip(f"the figures are of {figures['versions']}, here is {versions()}: see the head of this file")
    row = measure(*CASES[case])
    assert row["fits"]
    more = {key: (row[key], kept) for key, kept in figures[case].items() if row[key] > 1.05 * kept}
    assert not more


if __name__ == "__main__":
    rows = {case: measure(*words) for case, words in CASES.items()}
    rows = {case: {key: row[key] for key in KEPT} for case, row in rows.items()}
    FIGURES.write_text(json.dumps({"versions": versions()} | rows, indent=1) + "\n")
