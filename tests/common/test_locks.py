"""One process at a time writes an output: locks against real processes, kills, and outputs that are removed."""

import os
import pathlib
import pkgutil
import shutil
import subprocess
import sys
import time

import pytest

from llm2vec_gen_jax.common import files, jsonl, locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.serving import encode_corpus
from tests.conftest import check_error, write_jsonl
from tests.helpers import commands
from tests.helpers.bulk import settings, write_texts
from tests.helpers.tasks import needs_mteb

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """if True:
    import sys, time
    from llm2vec_gen_jax.common import locks
    with locks.locked(sys.argv[1]):
        print(1, flush=True)
        time.sleep(60)
    """


@pytest.fixture
def python():
    """python(code, *words) starts a Python in the project's root; it is ended with the test."""
    started = []

    def start(code, *words):
        command = [sys.executable, "-c", code, *map(str, words)]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def hold(python):
    """hold(path) starts a process that writes `path`, and returns it when it has the lock."""

    def start(path):
        process = python(HOLD, os.path.abspath(path))
        assert process.stdout.readline() == "1\n"
        return process

    return start


def test_a_killed_process_releases_its_lock_and_nothing_stays(hold, tmp_path):
    output = tmp_path / "new" / "run"
    process = hold(output)
    with pytest.raises(InputError, match="run: another process is writing to it"), locks.locked(output):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "new")  # another name of the same place
    with pytest.raises(InputError, match="output=.*another process"), locks.locked(tmp_path / "link" / "run", "output"):
        pass
    process.kill()
    process.wait()
    assert [path.name for path in output.parent.iterdir()] == [".run.lock"]
    with locks.locked(output):
        output.mkdir()
        shutil.rmtree(output)  # as train.overwrite does: the lock is not in it
        with pytest.raises(InputError, match="another process"), locks.locked(output):
            pass
    assert not list(output.parent.iterdir())
    with locks.locked(tmp_path / "other" / "folder" / "run"):
        pass
    assert not (tmp_path / "other").exists()


def test_never_two_at_once_however_many_wait(python, tmp_path):
    """Each removes the lock file when it is done, under processes that have opened it and wait."""
    code = """if True:
        import os, pathlib, sys, time
        from llm2vec_gen_jax.common import locks
        folder = pathlib.Path(sys.argv[1])
        for _ in range(60):
            lock = locks.Lock(folder / "lock")
            while not lock.acquire():
                time.sleep(0.0005)
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            time.sleep(0.0005)
            (folder / "inside").unlink()
            lock.release()
        """
    processes = [python(code, tmp_path) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert not list(tmp_path.iterdir())


def test_a_folder_beside_which_nothing_can_be_written_is_locked_itself(tmp_path, monkeypatch):
    output = tmp_path / "mounted"
    output.mkdir()
    real = os.open

    def read_only(path, *more):
        if str(path).endswith(".lock"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more)

    monkeypatch.setattr(os, "open", read_only)
    with locks.locked(output), pytest.raises(InputError, match="another process"), locks.locked(output):
        pass
    with locks.locked(output):
        assert not list(output.iterdir())
    with pytest.raises(PermissionError, match="missing"), locks.locked(tmp_path / "missing"):
        pass


COMMANDS = {
    "train data.responses=none train.overwrite=true": "train.output",
    "train_teacher train.overwrite=true": "train.output",
    "respond input=none overwrite=true": "output",
    "synthesize overwrite=true": "output",
    "instruct input=none overwrite=true": "output",
    "quickstart overwrite=true": "output",
    "evaluate none tasks=none overwrite=true": "output",
    "reproduce tasks=none": "output",
    "encode none input=none": "output",
    "decode none input=none": "output",
    "lens logit none text=a": "output",
    "lens build_index none input=none": "output",
    "lens query none text=a index=none": "output",
    "lens generations none input=none": "output",
    "lens report none input=none": "output",
    "convert from_pytorch none": "output",
    "convert to_pytorch none": "merged",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_the_second_of_two_commands_reads_and_removes_nothing(line, hold, command):
    output = "mine.jsonl"
    hold(output)
    words = line.split()
    if words[0] in ("lens", "convert"):
        words[:2] = [" ".join(words[:2])]
    if words[0] in ("respond", "synthesize", "instruct"):
        pathlib.Path(output).write_text("{}\n")
    else:
        pathlib.Path(output).mkdir()
        pathlib.Path(output, "queries.jsonl").write_text("{}\n")
    result = command(*words, f"{COMMANDS[line]}={output}")
    check_error(result, f"{COMMANDS[line]}={output}: another process is writing to it")
    assert pathlib.Path(output).exists()
    if pathlib.Path(output).is_dir():
        assert [path.name for path in pathlib.Path(output).iterdir()] == ["queries.jsonl"]


def test_two_real_trainings_of_one_output(tiny_folder, tmp_path, launch, command):
    """The second is refused, whatever it asks for; when the first was killed, the same command goes on."""
    backbone = tiny_folder("llama")
    data = write_jsonl(tmp_path / "responses.jsonl", commands.RESPONSES)
    words = [f"backbone.path={backbone}", f"data.responses={data}", *commands.TRAIN]
    words = [*words, "train.log_every=1", f"train.output={tmp_path / 'run'}"]
    first = launch(tmp_path, "train", *words, "train.steps=100000", "train.checkpoint_every=10")
    metrics = tmp_path / "run" / "metrics.jsonl"
    _wait_for(lambda: metrics.exists() and metrics.stat().st_size, first)
    for more in ((), ("train.overwrite=true",)):
        check_error(command("train", *words, *more), "run: another process is writing to it")
    assert first.poll() is None and (tmp_path / "run" / "config.yaml").exists()
    first.kill()
    first.wait()
    commands.succeed(command("train", *words, "train.overwrite=true"))
    assert not list(tmp_path.glob(".*"))


def test_two_real_responds_of_one_output(talker_folder, tmp_path, launch, command):
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"question": f"{n} " + "a" * n} for n in range(200)])
    words = (f"backbone.path={talker_folder}", f"input={queries}", f"output={tmp_path / 'out.jsonl'}", "batch_size=2")
    first = launch(tmp_path, "respond", *words)
    _wait_for(lambda: (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl").stat().st_size, first)
    check_error(command("respond", *words, "overwrite=true"), "out.jsonl: another process is writing to it")
    (tmp_path / "out.jsonl").unlink()  # and now it has no output any more
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 1 and "out.jsonl: was removed or replaced while it was written" in errors
    assert not list(tmp_path.glob(".*"))


def _wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_an_appender_changes_nothing_before_it_has_the_lock(tmp_path):
    path = tmp_path / "rows.jsonl"
    with jsonl.JsonlAppender(path, {"seed": 0}) as output:
        output.append([{"id": 0}])
        with pytest.raises(InputError, match="another process is writing to it"):
            jsonl.JsonlAppender(path, {"seed": 1}, overwrite=True)
        output.append([{"id": 1}])
    with jsonl.JsonlAppender(path, {"seed": 0}) as output:
        assert output.rows == [{"id": 0}, {"id": 1}]
    # A kill between the first two writes leaves an empty file, or one with another record: they hold nothing yet.
    path.write_bytes(b"")
    with jsonl.JsonlAppender(path, {"seed": 2}) as output:
        output.append([{"id": 2}])
    with pytest.raises(InputError, match="holds another run"):
        jsonl.JsonlAppender(path, {"seed": 0})


@pytest.mark.parametrize("how", ["removed", "replaced", "its record"])
def test_lines_of_a_file_that_is_gone_are_an_error(tmp_path, how):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(OSError, match="was removed or replaced"), jsonl.JsonlAppender(path, {}) as output:
        output.append([{"id": 0}])
        (output.sidecar if how == "its record" else path).unlink()
        if how == "replaced":
            path.write_text('{"id": 0}\n')


@pytest.mark.parametrize("gone", ["embeddings-00000.npy", "progress.jsonl", "soft_prompts-00001.npy", "."])
def test_vectors_that_are_gone_are_an_error_and_a_repeat_makes_them(model_folder, tmp_path, monkeypatch, gone):
    write_texts(tmp_path)
    config = settings(tmp_path, save_soft_prompts=True)
    manifest_of = encode_corpus._Job._manifest

    def remove(job):
        path = tmp_path / "out" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return manifest_of(job)

    with monkeypatch.context() as patch:
        patch.setattr(encode_corpus._Job, "_manifest", remove)
        with pytest.raises(OSError, match="was removed or replaced"):
            encode_corpus.encode_corpus(str(model_folder), config)
    assert not (tmp_path / "out" / "manifest.json").exists()
    encode_corpus.encode_corpus(str(model_folder), config)
    encode_corpus.encode_corpus(str(model_folder), settings(tmp_path, "undisturbed", save_soft_prompts=True))
    found, expected = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("out", "undisturbed"))
    assert found == expected


def test_shares_write_side_by_side_and_other_divisions_are_refused(model_folder, tmp_path, hold):
    from llm2vec_gen_jax.config import ShardConfig

    write_texts(tmp_path)
    hold(tmp_path / "out" / "progress-00000-of-00002")  # as the first share does
    encode_corpus.encode_corpus(str(model_folder), settings(tmp_path, shard=ShardConfig(1, 2)))
    with pytest.raises(InputError, match="another process is writing to it"):
        encode_corpus.encode_corpus(str(model_folder), settings(tmp_path, shard=ShardConfig(0, 2)))
    with pytest.raises(InputError, match="shard.count: 2 -> 1"):
        encode_corpus.encode_corpus(str(model_folder), settings(tmp_path))


def test_a_training_whose_output_is_removed_fails(tiny, tiny_folder, tmp_path, command, monkeypatch):
    from llm2vec_gen_jax.pretrained import model_directory

    save = model_directory.save

    def removing(path, *more, **named):
        shutil.rmtree(path.parent)
        save(path, *more, **named)

    monkeypatch.setattr(model_directory, "save", removing)
    result = commands.train(command, tiny_folder("llama"), commands.RESPONSES)
    check_error(result, "was removed or replaced while it was written. Repeat the command", code=1)
    monkeypatch.undo()


def test_metrics_that_are_removed_end_the_training(tmp_path):
    from llm2vec_gen_jax.training.metrics import MetricsWriter

    (tmp_path / "run").mkdir()
    with pytest.raises(OSError, match="metrics.jsonl"), MetricsWriter(tmp_path / "run", 0) as writer:
        writer.write({"step": 1, "loss": 1.0})
        shutil.rmtree(tmp_path / "run")
        writer.write({"step": 2, "loss": 1.0})


KILLED = """if True:
    import pathlib, sys, time
    from llm2vec_gen_jax.common import files
    make = files.atomic_directory if sys.argv[2] == "folder" else files.atomic_path
    with make(pathlib.Path(sys.argv[1])) as path:
        (path / "weights" if sys.argv[2] == "folder" else path).write_bytes(bytes(1000))
        print(1, flush=True)
        time.sleep(60)
    """


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_repeat_removes_what_a_kill_left_and_not_what_lives(python, tmp_path, kind):
    target = tmp_path / "model.json"
    killed, alive = python(KILLED, target, kind), python(KILLED, target, kind)
    for process in (killed, alive):
        assert process.stdout.readline() == "1\n"
    mine = tmp_path / ".model.json.tmp-backup"  # of another name than ours
    mine.mkdir()
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 3
    make = files.atomic_directory if kind == "folder" else files.atomic_path
    with make(target) as path:
        assert len(list(tmp_path.iterdir())) == 3  # ours, that of the living, and the user's
        (path / "weights" if kind == "folder" else path).write_bytes(b"")
    alive.kill()
    alive.wait()
    shutil.rmtree(target) if kind == "folder" else target.unlink()
    with make(target):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "model.json"]


def test_a_killed_convert_leaves_nothing_to_a_repeated_one(model_folder, tmp_path, launch, command):
    out = tmp_path / "converted"
    left = tmp_path / f".{out.name}.tmp-abcd1234"
    left.mkdir()
    (left / "weights").write_bytes(bytes(100))
    (tmp_path / f".{out.name}.lock").touch()
    commands.succeed(command("convert from_pytorch", model_folder, f"output={out}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "here"]


def test_the_backbone_that_to_pytorch_adds_is_locked_too(model_folder, hold, command):
    pathlib.Path("model.gguf").touch()
    hold("converted-backbone")
    pathlib.Path("converted-backbone").mkdir()
    pathlib.Path("converted-backbone", files.UNFINISHED).touch()  # of the other process
    result = command("convert to_pytorch", model_folder, "backbone=model.gguf", "output=converted")
    check_error(result, "backbone_output=converted-backbone: another process is writing to it")
    assert os.path.exists(f"converted-backbone/{files.UNFINISHED}")


GONE = {  # command: (what is called last before its end, the words of the command behind MODEL)
    "lens logit": ("llm2vec_gen_jax.commands.lens.write_text", ["text=a", "output=out"]),
    "lens build_index": ("llm2vec_gen_jax.lens.index._build_index", ["input=corpus.txt", "output=out", "layers=3"]),
    "lens report": ("llm2vec_gen_jax.lens.report.write_report", ["input=corpus.txt", "output=out"]),
    "convert from_pytorch": ("llm2vec_gen_jax.LLM2VecGen.save_pretrained", ["output=out"]),
    "convert to_pytorch": ("llm2vec_gen_jax.pretrained.export.save_merged", ["merged=out"]),
    "evaluate": ("llm2vec_gen_jax.evaluation.evaluate._ResultsFile.add", ["tasks=task", "output=out"]),
}


@pytest.mark.parametrize("name", GONE)
def test_a_command_whose_output_is_removed_fails(name, model_folder, command, monkeypatch):
    if name == "evaluate":
        pytest.importorskip("mteb")
        commands.write_task(pathlib.Path("task"))
    pathlib.Path("corpus.txt").write_text("one text\nanother text\n")
    function, words = GONE[name]
    _remove_after(function, monkeypatch, "out")
    check_error(command(name, model_folder, *words), "was removed or replaced while it was written", code=1)


def test_a_training_of_teachers_whose_output_is_removed_fails(tiny_folder, command, monkeypatch):
    pathlib.Path("corpus.txt").write_text("".join(f"{number} is a number\n" for number in range(40)))
    _remove_after("llm2vec_gen_jax.formats.peft.merge", monkeypatch, "out")
    words = ["corpus.path=corpus.txt", "mntp.steps=1", "simcse.steps=0", "mntp.batch_size=8", "mntp.max_length=8"]
    result = command("train_teacher", f"backbone.path={tiny_folder('llama')}", *words, "train.output=out")
    check_error(result, "out/config.yaml: was removed or replaced", code=1)


@needs_mteb
def test_a_study_whose_output_is_removed_fails(task_folders, command, monkeypatch):
    from llm2vec_gen_jax.experiments.reproduce import Study

    monkeypatch.setattr(Study, "run", lambda study: study.output / "report.md")
    _remove_after("llm2vec_gen_jax.experiments.reproduce.Study.run", monkeypatch, "out")
    result = command("reproduce", f"tasks={task_folders}", "output=out")
    check_error(result, "out/study.json: was removed or replaced", code=1)


def _remove_after(function, monkeypatch, output):
    """Makes a function remove the output of the command that calls it."""
    real = pkgutil.resolve_name(function)

    def removing(*more, **named):
        result = real(*more, **named)
        shutil.rmtree(output) if os.path.isdir(output) else os.unlink(output)
        return result

    monkeypatch.setattr(function, removing)
