"""Real files with damage that is meant to harm: each reader refuses them in one line, in little time and memory."""

import gzip
import json
import random
import shutil

import numpy as np
import pytest
import yaml

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.files import sha256_file
from llm2vec_gen_jax.common.jsonl import JsonlAppender
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.formats import published
from llm2vec_gen_jax.inference.shards import write_shard
from tests.conftest import tiny_torch_model, write_jsonl
from tests.formats.test_gguf import write_gguf
from tests.helpers.commands import RESPONSES, write_task
from tests.helpers.fuzzing import FUZZ, hostile
from tests.helpers.readers import Reader

# Reader -> files of its folder, each damaged in turn; of a reader of one file, its kinds.
FILES = {
    "head": ["head"],
    "model": [
        "reconstruction_mlp",
        "alignment_mlp.safetensors",
        "encoder/adapter_config.json",
        "encoder/adapter_model.safetensors",
        "encoder_decoder_config.json",
        "run_config.yml",
        "tokenizer.json",
        "llm2vec_gen_jax.json",
        "config_sentence_transformers.json",
    ],
    "backbone": [
        "model.gguf",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    ],
    "adapter": ["adapter_config.json", "adapter_model.safetensors"],
    "corpus": ["x.txt", "x.jsonl", "x.jsonl.gz", "x.csv", "x.parquet", "file.arrow", "stream.arrow"],
    "corpus saved": ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"],
    "corpus splits": ["dataset_dict.json"],
    "records": ["x.jsonl", "x.jsonl.gz", "x.csv", "x.parquet"],
    "texts": ["x.txt", "x.jsonl"],
    "task": ["task.json", "corpus.jsonl", "queries.jsonl", "qrels.tsv"],
    "vectors": ["manifest.json", "embeddings-00000.npy", "embeddings-00001.parquet"],
    "array": ["x.npy"],
    "config": ["x.yaml"],
    "instructions": ["x.yaml"],
    "metrics": ["metrics.jsonl"],
    "run": ["rows.jsonl", "rows.jsonl.run.json", "rows.jsonl.crc32"],
}
WHOLE = {"model", "adapter", "corpus saved", "corpus splits", "task", "vectors", "metrics", "run"}  # read a folder


def path_of(place, name, file):
    """The path that a reader is given."""
    folder = place / name
    return folder if name in WHOLE or (name == "backbone" and file != "model.gguf") else folder / file


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_folder, tiny_folder):
    """A folder with the sound files of each reader in a folder of its name."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    place = tmp_path_factory.mktemp("hostile")
    for name in FILES:
        if name not in ("model", "backbone", "task"):
            (place / name).mkdir()
    shutil.copytree(model_folder, place / "model")
    shutil.copytree(tiny_folder("llama3"), place / "backbone")
    shutil.copy(place / "model" / "reconstruction_mlp", place / "head" / "head")
    (place / "backbone" / "README.md").write_text("---\nlicense: mit\ndate: 2024-02-28\ntags: [a, b]\n---\n\n# A\n")
    write_gguf(place / "backbone" / "model.gguf", tiny_torch_model("llama"))
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    backbone = json.loads((place / "backbone" / "config.json").read_text())
    shapes = {"A": (2, backbone["hidden_size"]), "B": (backbone["intermediate_size"], 2)}
    tensors = {key.format(part): np.ones(shape, np.float32) for part, shape in shapes.items()}
    published.write_safetensors(place / "adapter" / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["up_proj"]}
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"alpha_pattern": {"x": 3}}))

    rows = [{"text": f"text {number}", "id": number, **row} for number, row in enumerate(RESPONSES)]
    table = pyarrow.Table.from_pylist([{key: row[key] for key in ("text", "id", "question", "answer")} for row in rows])
    for name in ("corpus", "records", "texts"):
        (place / name / "x.txt").write_text("one\ntwo\n")
        write_jsonl(place / name / "x.jsonl", rows)
        (place / name / "x.jsonl.gz").write_bytes(gzip.compress((place / name / "x.jsonl").read_bytes()))
        (place / name / "x.csv").write_text('id,text,question,answer\n1,a,b,"c\nd"\n2,e,f,g\n')
        pyarrow.parquet.write_table(table, place / name / "x.parquet")
    for name, make in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with make(place / "corpus" / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    datasets.Dataset(table).save_to_disk(place / "corpus saved")
    (place / "corpus splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    write_task(place / "task")

    parts = {"embeddings-00000.npy": [0, 2], "embeddings-00001.parquet": [2, 4]}
    for file in parts:
        write_shard(place / "vectors" / file, [0, 1], np.ones((2, 5), np.float32))
    shards = [
        {"shard": number, "file": file, "rows": span, "sha256": sha256_file(place / "vectors" / file)}
        for number, (file, span) in enumerate(parts.items())
    ]
    manifest = {"shard": {"index": 0, "count": 1}, "rows": 4, "dimension": 5, "shards": shards}
    manifest |= {key: {} for key in ("model", "input", "config")}
    (place / "vectors" / "manifest.json").write_text(json.dumps(manifest))
    np.save(place / "array" / "x.npy", np.ones((2, 3), np.float32))
    (place / "config" / "x.yaml").write_text(options.to_yaml(config.TrainConfig()))
    (place / "instructions" / "x.yaml").write_text(yaml.safe_dump({"query": {"A": "Find:"}, "document": ""}))
    write_jsonl(place / "metrics" / "metrics.jsonl", [{"step": 1, "loss": 2.5}])
    with JsonlAppender(place / "run" / "rows.jsonl", {"a": 1}) as appender:
        appender.append([{"x": 1}, {"x": 2}])
    return place


@pytest.fixture(scope="module")
def reader(place):
    sound = [(name.split()[0], path_of(place, name, file)) for name, files in FILES.items() for file in files]
    reader = Reader([pair for pair in dict.fromkeys(sound) if "splits" not in str(pair[1])])
    yield reader
    reader.stop()


@pytest.mark.parametrize("name, file", [(name, file) for name, files in FILES.items() for file in files])
def test_any_damage_of_any_file_is_refused_soon(reader, place, name, file):
    reader.ready()
    target = place / name / file
    sound = {path: path.read_bytes() for path in sorted(target.parent.rglob("*")) if path.is_file()}
    for seed in range(max(8, FUZZ.max_examples // 4)):
        target.unlink()  # it may be mapped: never altered in place
        target.write_bytes(hostile(random.Random(f"{name} {file} {seed}"), sound[target]))
        try:
            answer = reader.read(name.split()[0], path_of(place, name, file))
        finally:
            for path in {path for path in target.parent.rglob("*") if path.is_file()} | set(sound):
                if path == target or path not in sound or not path.is_file() or path.read_bytes() != sound[path]:
                    path.unlink(missing_ok=True)
                    if path in sound:
                        path.write_bytes(sound[path])
        assert answer == "read" or answer.startswith("refused: "), f"seed {seed}: {answer}"
        assert len(answer) < 2100 and answer.isprintable()
        assert not any(sign in answer for sign in ("MemoryError", "bad_alloc", "malloc", "allocate")), answer
