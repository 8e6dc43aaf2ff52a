"""Files that an earlier version wrote are read and continued: model and run directories, vectors, an index.

`fixtures/written_before.tar.gz` holds a tiny random Qwen3 and what the commands below wrote with the last version
before the modules moved into folders (7ab8c53), without checkpoint 1 and the events of TensorBoard.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest
import yaml

from llm2vec_gen_jax import LLM2VecGen, load_embeddings
from tests.conftest import one_device_mesh

ARCHIVE = pathlib.Path(__file__).parent / "fixtures" / "written_before.tar.gz"
RESPOND = (
    "backbone.path=backbone backbone.dtype=float32 input=queries.jsonl output=responses.jsonl max_new_tokens=6"
    " batch_size=2"
).split()
TRAIN = (
    "backbone.path=backbone backbone.dtype=float32 data.responses=responses.jsonl train.output=run train.batch_size=2"
    " train.log_every=1 compression.num_tokens=2 train.checkpoint_every=1 optimizer.schedule_steps=4"
    " optimizer.warmup_steps=0"
).split()  # with train.steps=2
ENCODE = "input=texts.txt output=vectors dtype=float32 shard_size=2 batch_size=1 max_length=32".split()
INDEX = "input=texts.txt output=index layers=3 dtype=float32".split()
LOSSES = {3: 6.629260540008545, 4: 6.364833831787109}  # of the same version, with train.steps=4


@pytest.fixture
def run(tmp_path, launch):
    """run(NAME, *arguments) runs a command in a process with one device, in the folder of the files: its output."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.3 and older have no filters
        archive.extractall(tmp_path)
    recorded = tmp_path / "run" / "model" / "run_config.yml"  # names the backbone by the folder it was in
    settings = yaml.safe_load(recorded.read_text())
    recorded.write_text(yaml.safe_dump(settings | {"model_name_or_path": str(tmp_path / "backbone")}))

    def start(name, *arguments):
        process = launch(tmp_path, *name.split(), *arguments)
        shown, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return shown

    return start


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_is_resumed_from_its_checkpoint(run, tmp_path):
    targets = contents(tmp_path / "responses.jsonl.targets")
    assert "resuming run at step 2" in run("train", *TRAIN, "train.steps=4")
    assert contents(tmp_path / "responses.jsonl.targets") == targets, "the targets are not computed again"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows[2:]:
        np.testing.assert_allclose(row["loss"], LOSSES[row["step"]], rtol=1e-4)


@pytest.mark.parametrize(
    "name, arguments",
    [("respond", RESPOND), ("encode", ["run/model", *ENCODE]), ("train", [*TRAIN, "train.steps=2"])],
)
def test_a_finished_command_is_repeated_without_a_change(run, tmp_path, name, arguments):
    before = contents(tmp_path)
    run(name, *arguments)
    after = contents(tmp_path)
    assert {path: after[path] for path in before if path.name != "config.yaml"} == {
        path: data for path, data in before.items() if path.name != "config.yaml"
    }


def test_a_model_directory_gives_the_vectors_of_its_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = pathlib.Path("texts.txt").read_text().splitlines()
    model = LLM2VecGen.from_pretrained("run/model", "float32", mesh=one_device_mesh())
    vectors = model.encode(texts, max_length=32)
    np.testing.assert_allclose(vectors, load_embeddings("vectors", verify=True), atol=1e-5)


def test_an_index_is_searched(run):
    assert "[layer 3]" in run("lens query", "run/model", "text=text number 3", "index=index", "dtype=float32")
