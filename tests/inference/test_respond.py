"""Queries and responses: what is killed goes on, shards are the whole, other settings are refused."""

import signal
import time

import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.inference.respond import respond
from llm2vec_gen_jax.inference.synthesize import synthesize
from tests.conftest import write_jsonl
from tests.helpers.commands import rows_of

# Responses and queries


def test_a_killed_respond_started_again_loses_and_repeats_nothing(talker_folder, tmp_path, launch):
    queries = [{"question": f"What is {number * 7919 % 997}? " * (number % 4 + 1)} for number in range(240)]
    write_jsonl(tmp_path / "queries.jsonl", queries)
    words = [f"backbone.path={talker_folder}", "input=queries.jsonl", "batch_size=2", "max_new_tokens=12"]
    undisturbed = launch(tmp_path, "respond", *words, "output=undisturbed.jsonl")
    killed = launch(tmp_path, "respond", *words, "output=killed.jsonl")
    path = tmp_path / "killed.jsonl"
    while not path.exists() or path.stat().st_size < 1000:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = path.read_bytes()
    assert 0 < before.count(b"\n") < len(queries)
    path.write_bytes(before[:-3])  # as if the last write had been torn
    again = launch(tmp_path, "respond", *words, "output=killed.jsonl")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert undisturbed.communicate(timeout=120) and undisturbed.returncode == 0
    assert path.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    rows = rows_of(path)
    assert sorted(row["id"] for row in rows) == list(range(len(queries)))
    assert all(row["question"] == queries[row["id"]]["question"] for row in rows)
    assert {row["finish"] for row in rows} == {"stop", "length"}
    assert path.read_bytes().startswith(before[:-3])


def respond_settings(tmp_path, **more):
    return config.RespondConfig(
        input=str(tmp_path / "queries.jsonl"), batch_size=4, max_new_tokens=12, **({"output": "a.jsonl"} | more)
    )


def test_shards_together_are_the_whole(talker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "queries.jsonl", [{"question": f"q {'x' * (n % 5)}", "id": f"id{n}"} for n in range(14)])
    for temperature in (0.0, 1.0):
        more = {"temperature": temperature, "overwrite": True}
        whole = rows_of(respond(respond_settings(tmp_path, **more), talker))
        parts = []
        for index in range(3):
            settings = respond_settings(tmp_path, shard=config.ShardConfig(index, 3), **more)
            path = respond(settings, talker)
            assert path.name == f"a.0000{index}-of-00003.jsonl"
            parts += rows_of(path)
        assert sorted(parts, key=lambda row: row["id"]) == sorted(whole, key=lambda row: row["id"])
        assert len(whole) == 14


def test_several_samples_of_each_query_resume_wherever_they_are_cut(talker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "queries.jsonl", [{"question": f"q {'x' * (n % 3)}"} for n in range(5)])
    more = {"temperature": 1.0, "samples": 3}
    path = respond(respond_settings(tmp_path, **more), talker)
    whole, rows = path.read_bytes(), rows_of(path)
    assert sorted((row["id"], row["sample"]) for row in rows) == [(n, k) for n in range(5) for k in range(3)]
    assert len({row["answer"] for row in rows}) > 10, "samples of one query are alike"
    for cut in (0, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert respond(respond_settings(tmp_path, **more), talker).read_bytes() == whole
    parts = []
    for index in range(2):
        settings = respond_settings(tmp_path, **more, shard=config.ShardConfig(index, 2))
        parts += rows_of(respond(settings, talker))
    assert sorted(map(str, parts)) == sorted(map(str, rows))
    with pytest.raises(InputError, match="a.jsonl: holds another run .samples: 3 -> "):
        respond(respond_settings(tmp_path, temperature=1.0), talker)
    with pytest.raises(InputError, match="samples=2: .*temperature"):
        respond(respond_settings(tmp_path, samples=2), talker)


def test_a_finished_respond_writes_nothing_and_other_settings_are_refused(talker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "queries.jsonl", [{"question": f"q{n}"} for n in range(6)])
    path = respond(respond_settings(tmp_path), talker)
    before = path.read_bytes()
    assert respond(respond_settings(tmp_path), talker) == path and path.read_bytes() == before
    with pytest.raises(InputError, match="a.jsonl: holds another run .sampling"):
        respond(respond_settings(tmp_path, temperature=0.5), talker)
    write_jsonl(tmp_path / "queries.jsonl", [{"question": f"q{n}"} for n in range(7)])
    with pytest.raises(InputError, match="a.jsonl: holds another run .input"):
        respond(respond_settings(tmp_path), talker)
    assert path.read_bytes() == before
    limited = rows_of(respond(respond_settings(tmp_path, limit=6, output="b.jsonl"), talker))
    assert limited == rows_of(path)


def test_synthesize_resumes_to_the_same_bytes_wherever_it_is_cut(talker, tmp_path):
    settings = config.SynthesizeConfig(output=str(tmp_path / "q.jsonl"), count=14, batch_size=4, max_new_tokens=40)
    path = synthesize(settings, talker)
    whole, rows = path.read_bytes(), rows_of(path)
    assert len(rows) == 14 and len({row["question"] for row in rows}) == 14
    assert [row["id"] for row in rows] == sorted({row["id"] for row in rows})
    assert rows[-1]["id"] > 14, "some samples were left out: else this test shows little"
    for cut in (0, 5, len(whole) // 3, whole.index(b"\n") + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert synthesize(settings, talker).read_bytes() == whole
    # More of them are the same ones and some more.
    more = synthesize(config.SynthesizeConfig(**vars(settings) | {"count": 17}), talker).read_bytes()
    assert more.startswith(whole) and more.count(b"\n") == 17
    with pytest.raises(InputError, match="q.jsonl: holds another run .seed: 0 -> 1"):
        synthesize(config.SynthesizeConfig(**vars(settings) | {"seed": 1}), talker)


def test_synthesize_gives_up_on_what_writes_no_queries(talker, tmp_path):
    settings = config.SynthesizeConfig(output=str(tmp_path / "q.jsonl"), count=2, batch_size=1, max_new_tokens=2)
    with pytest.raises(InputError, match="no new query"):  # too short, all of them
        synthesize(settings, talker)
    with pytest.raises(InputError, match="temperature"):
        synthesize(config.SynthesizeConfig(output=str(tmp_path / "z.jsonl"), temperature=0.0), talker)
