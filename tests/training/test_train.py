"""Training: resumed, killed and sharded runs equal undisturbed ones; run directories; the model that comes out."""

import functools
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from llm2vec_gen_jax import LLM2VecGen, config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.data import buckets
from llm2vec_gen_jax.model import compressor
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from llm2vec_gen_jax.training import loop
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.optimizer import make_optimizer, make_schedule
from llm2vec_gen_jax.training.step import TrainState, jit_step, new_state, train_step
from llm2vec_gen_jax.training.train import train
from tests.conftest import one_device_mesh, tiny_tokenizer, tiny_torch_model, write_jsonl

K = 4
RECORDS = [
    {"question": f"What is {number}?", "answer": f"It is {'abcdefgh'[number % 8] * (1 + number % 6)}."}
    for number in range(24)
]
COMMON = (
    "data.responses=../responses.jsonl",
    f"compression.num_tokens={K}",
    "data.max_buckets=1",
    "optimizer.warmup_steps=2",
    "train.output=run",
    "train.batch_size=8",
    "train.log_every=1",
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with responses.jsonl; `place(name)` goes to a subdirectory, from which runs have equal paths."""
    write_jsonl(tmp_path / "responses.jsonl", RECORDS)

    def go(name="here"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        return folder

    go()
    return go


@pytest.fixture
def run(tiny_folder, tiny):
    """run("key=value", ...) trains on a tiny backbone, with COMMON, and returns the run directory."""

    def start(*words, backbone=None):
        words = (f"backbone.path={tiny_folder('qwen3')}", *COMMON, *words)
        settings = options.load(config.TrainConfig, None, words)
        train(settings, show_progress=False, backbone=backbone or tiny("qwen3"))
        return pathlib.Path(settings.train.output).absolute()

    return start


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """Where the first `finished` keeps its run for the next."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def finished(place, run, trained_once):
    """The run directory of run("train.steps=2"), which is trained once and then copied."""
    folder = place() / "run"
    if trained_once.exists():
        shutil.copytree(trained_once, folder)
    else:
        shutil.copytree(run("train.steps=2"), trained_once)
    return folder


def saved(run, step):
    """The arrays of a checkpoint as {path: numpy array}."""
    with ocp.CheckpointManager(run / "checkpoints", item_names=("state", "record")) as manager:
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(restored)}


def trainable(run, step):
    """The trainable tree of a checkpoint."""
    with ocp.CheckpointManager(run / "checkpoints", item_names=("state", "record")) as manager:
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]["trainable"]


def records_of(run):
    """The metrics records without what is measured in seconds."""
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in read_metrics(run)]


def contents(folder):
    """{relative path: bytes} of a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_equal_arrays(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        np.testing.assert_array_equal(value, right[name], err_msg=name)


# Resuming


def test_four_steps_equal_two_and_two_resumed_bit_for_bit(place, run):
    place("straight")
    straight = run("train.steps=4", "train.checkpoint_every=2")
    place("resumed")
    resumed = run("train.steps=2")
    assert [row["step"] for row in read_metrics(resumed)] == [1, 2]
    assert run("train.steps=4", "train.checkpoint_every=2") == resumed
    assert_equal_arrays(saved(straight, 2), saved(resumed, 2))
    assert_equal_arrays(saved(straight, 4), saved(resumed, 4))
    assert any((saved(straight, 2)[name] != saved(straight, 4)[name]).any() for name in saved(straight, 2))
    assert records_of(straight) == records_of(resumed)
    assert contents(straight / "model") == contents(resumed / "model")


@pytest.mark.slow
def test_a_killed_process_started_again_gives_the_same_model(place, tiny_folder, launch):
    backbone = f"backbone.path={tiny_folder('qwen3')}"
    words = ("train", backbone, *COMMON, "train.steps=120", "train.checkpoint_every=10")
    undisturbed = launch(place("undisturbed"), *words)
    killed = launch(place("killed"), *words)
    while not (place("killed") / "run/checkpoints/20").exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (place("killed") / "run/model").exists()
    again = launch(place("killed"), *words)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert int(output.split("resuming run at step ")[1].split()[0]) in range(20, 120, 10)
    assert undisturbed.communicate(timeout=120) and undisturbed.returncode == 0
    runs = [place(name) / "run" for name in ("undisturbed", "killed")]
    assert records_of(runs[0]) == records_of(runs[1])
    assert contents(runs[0] / "model") == contents(runs[1] / "model")


def test_a_run_killed_after_its_last_step_only_writes_the_model(run, finished):
    model, metrics = contents(finished / "model"), records_of(finished)
    shutil.rmtree(finished / "model")
    run("train.steps=2")
    assert contents(finished / "model") == model
    assert records_of(finished) == metrics


def test_a_finished_run_says_so_and_does_nothing(run, finished, messages):
    before = {path: path.stat().st_mtime_ns for path in [finished / "metrics.jsonl", *(finished / "model").rglob("*")]}
    messages()
    run("train.steps=2")
    assert "model: already finished" in messages()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_changed_data_or_backbone_under_a_run_is_refused(run, finished, tmp_path):
    before = contents(finished)
    write_jsonl(tmp_path / "responses.jsonl", [*RECORDS[1:], RECORDS[0]])
    with pytest.raises(InputError, match=r"checkpoints/2: is of another run \(data: .* -> .*overwrite=true"):
        run("train.steps=4")
    write_jsonl(tmp_path / "responses.jsonl", RECORDS)
    tiny_torch_model("qwen3", rms_norm_eps=2e-5).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    other = load_backbone(str(tmp_path / "other"), "float32", one_device_mesh())
    with pytest.raises(InputError, match=r"is of another run \(backbone: "):
        run("train.steps=4", backbone=other)  # in the place of the first
    for name in ("model", "metrics.jsonl", "checkpoints/2/state"):
        kept = {path: content for path, content in before.items() if str(path).startswith(name)}
        assert kept and all((finished / path).read_bytes() == content for path, content in kept.items())


# Run directories


def test_another_config_is_refused_and_named_unless_it_overwrites(run, finished):
    before = contents(finished)
    expected = "train.output=run: holds another run .optimizer.learning_rate: 0.0005 -> 0.1, train.seed: 42 -> 7"
    with pytest.raises(InputError, match=expected):
        run("train.steps=2", "optimizer.learning_rate=0.1", "train.seed=7")
    assert contents(finished) == before
    run("train.steps=1", "optimizer.learning_rate=0.1", "train.overwrite=true")
    assert [row["step"] for row in read_metrics(finished)] == [1]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir() if path.name.isdigit()) == ["1"]


@pytest.mark.parametrize("name, content", [("notes.txt", "mine"), ("config.yaml", "a: 1"), ("config.yaml", "{}")])
def test_a_folder_that_is_no_run_is_never_touched(place, run, name, content):
    folder = place() / "run"
    folder.mkdir()
    (folder / name).write_text(content)
    (folder / "data.bin").write_text("mine")
    for overwrite in ("true", "false"):
        with pytest.raises(InputError, match="train.output=run: exists and is not a run directory"):
            run("train.steps=1", f"train.overwrite={overwrite}")
    assert {str(path): path.read_text() for path in folder.iterdir()} == {
        str(folder / name): content,
        str(folder / "data.bin"): "mine",
    }
    with pytest.raises(InputError, match="is not a run directory"):
        run("train.steps=1", "train.overwrite=true", "train.output=../responses.jsonl")


def test_a_mistake_put_right_goes_on_in_the_same_directory(place, run):
    with pytest.raises(InputError, match="none.jsonl: no such file"):
        run("train.steps=1", "data.responses=none.jsonl")
    with pytest.raises(InputError, match="train.batch_size"):
        run("train.steps=1", "train.batch_size=48")
    with pytest.raises(InputError, match="nowhere"):
        run("train.steps=1", "train.init_from=nowhere")
    assert (run("train.steps=1") / "model").is_dir()


def test_metrics_and_config_are_what_the_contract_says(place, run):
    folder = run("train.steps=5", "train.log_every=2", "optimizer.schedule_steps=10", "data.shuffle=false")
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    names = {"step", "loss", "reconstruction_loss", "alignment_loss", "grad_norm", "learning_rate"}
    assert all(set(row) == names | {"tokens_per_second", "padding_fraction"} for row in rows)
    for row in rows:
        assert np.isclose(row["loss"], row["reconstruction_loss"] + row["alignment_loss"])
        assert 0 <= row["padding_fraction"] < 1 and row["tokens_per_second"] > 0
    schedule = make_schedule(config.OptimizerConfig(schedule_steps=10, warmup_steps=2))
    assert [row["learning_rate"] for row in rows] == [float(schedule(row["step"] - 1)) for row in rows]
    resolved = options.load(config.TrainConfig, folder / "config.yaml")
    assert (resolved.train.steps, resolved.optimizer.schedule_steps, resolved.data.shuffle) == (5, 10, False)
    assert list((folder / "tensorboard").iterdir())


def test_the_heads_can_have_a_learning_rate_of_their_own():
    rng = np.random.default_rng(0)
    head = {"kernel": (3, 3), "bias": (3,)}
    shapes = {"tokens": (4, 3), **dict.fromkeys(compressor.HEADS, head)}
    start, *gradients = (
        jax.tree.map(
            lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: type(x) is tuple
        )
        for _ in range(4)
    )

    def trained(**settings):
        optimizer = make_optimizer(config.OptimizerConfig(warmup_steps=2, weight_decay=0.1, **settings))
        tree, state = start, optimizer.init(start)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, tree)
            tree = optax.apply_updates(tree, updates)
        return tree

    usual, equal = trained(learning_rate=1e-3), trained(learning_rate=1e-3, head_learning_rate=1e-3)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), usual, equal)
    fixed = trained(learning_rate=1e-3, head_learning_rate=0)
    heads = trained(learning_rate=0, head_learning_rate=1e-3)
    for name in shapes:
        changed, unchanged = (fixed, heads) if name == "tokens" else (heads, fixed)
        jax.tree.map(np.testing.assert_array_equal, unchanged[name], start[name])
        assert all((x != y).any() for x, y in zip(*map(jax.tree.leaves, (changed[name], start[name]))))


def test_answers_matter_only_through_the_targets_without_reconstruction(place, run):
    folder = place()
    np.save(folder / "targets.npy", np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32))
    words = ["teacher.kind=file", "teacher.path=targets.npy", "data.max_buckets=4", "loss.reconstruction=0"]
    found = []
    for name, times in (("long", 9), ("short", 1)):
        records = [{**record, "answer": record["answer"] * times} for record in RECORDS]
        write_jsonl(folder / f"{name}.jsonl", records)
        path = run(*words, f"data.responses={name}.jsonl", "train.steps=4", f"train.output={name}")
        found.append((trainable(path, 4), records_of(path)))
    jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
    assert found[0][1] == found[1][1], "answers do not count as tokens"


def test_the_loop_sends_nothing_to_the_device_but_batches(place, run, monkeypatch):
    """A learning rate worked out on the device for the log would wait there for the step under way."""
    add = loop._Window.add

    def stray(window, values, computed):
        add(window, values, computed)
        jnp.float32(values["loss"]) + 1

    monkeypatch.setattr(loop._Window, "add", stray)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        run("train.steps=1")


def test_every_second_of_the_loop_is_counted_in_a_record(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    window = loop._Window(np.ones(9))
    for number in (1, 2, 3):
        window.add({"loss": 1.0, "tokens": 7}, 8)
        assert window.flush(number)["tokens_per_second"] == 7.0
    with window.paused():  # one second later, for 11 seconds
        for _ in range(10):
            next(clock)
    window.add({"loss": 1.0, "tokens": 7}, 8)
    assert window.flush(4)["tokens_per_second"] == 3.5


# What trains and what does not


def test_the_loss_of_a_memorisable_set_falls(place, run, tmp_path):
    write_jsonl(tmp_path / "responses.jsonl", RECORDS[:8])
    schedule = ("optimizer.schedule=constant", "optimizer.learning_rate=0.02", "optimizer.warmup_steps=0")
    rows = read_metrics(run("train.steps=80", "train.checkpoint_every=80", *schedule))
    assert rows[-1]["reconstruction_loss"] < 0.7 * rows[0]["reconstruction_loss"]
    assert rows[-1]["alignment_loss"] < 0.2 * rows[0]["alignment_loss"]


def test_only_what_trains_is_saved_and_the_backbone_stays_as_it_was(place, run, tmp_path):
    tiny_torch_model("qwen3", intermediate_size=4096).save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    backbone = load_backbone(str(tmp_path / "wide"), "float32", one_device_mesh())
    before = jax.tree.map(np.array, backbone.frozen)
    folder = run("train.steps=2", backbone=backbone)
    jax.tree.map(np.testing.assert_array_equal, backbone.frozen, before)
    frozen_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(before))
    checkpoint_bytes = sum(len(content) for content in contents(folder / "checkpoints/2").values())
    assert frozen_bytes > 4_000_000 > 20 * checkpoint_bytes
    arrays = saved(folder, 2)
    trained = sum(value.size for name, value in arrays.items() if name.startswith("['trainable']"))
    assert trained == K * 32 + 2 * (32 * 32 + 32)
    counters = 3  # the step, and the optimizer's two
    assert sum(value.size for value in arrays.values()) == 3 * trained + counters


def test_a_batch_that_does_not_divide_over_the_mesh_is_named(place, run, tiny_folder):
    mesh = sharding.make_mesh(config.MeshConfig(data=8))
    backbone = load_backbone(str(tiny_folder("qwen3")), "float32", mesh)
    with pytest.raises(InputError, match="train.batch_size=12 is not divisible by 8 data shards"):
        run("train.steps=1", "train.batch_size=12", backbone=backbone)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_rows(place, run, tmp_path):
    write_jsonl(tmp_path / "responses.jsonl", [{"question": "q", "answer": " "}, *RECORDS])
    targets = np.random.default_rng(0).normal(size=(25, 6)).astype(np.float32)
    np.save(tmp_path / "clean.npy", targets)
    targets[11, 2] = 3e38  # finite; its square is not
    np.save(tmp_path / "huge.npy", targets)
    words = ("train.checkpoint_every=1", "data.shuffle=false", "teacher.kind=file")
    with pytest.raises(FloatingPointError) as error:
        run("train.steps=3", *words, "teacher.path=../huge.npy")
    message = str(error.value)
    assert "step 2: the loss is inf" in message and "rows [9, 10, 11, 12, 13, 14, 15, 16]" in message
    assert "responses.jsonl" in message
    stopped = place() / "run"
    assert not (stopped / "model").exists()
    assert [row["step"] for row in read_metrics(stopped)] == [1]
    clean = run("train.steps=1", *words, "teacher.path=../clean.npy", "train.output=clean")
    # The first batch does not hold the row: the checkpoint before is that of an undisturbed run.
    assert_equal_arrays(saved(stopped, 1), saved(clean, 1))
    with ocp.CheckpointManager(stopped / "checkpoints") as manager:
        assert manager.latest_step() == 1


def test_a_step_with_a_loss_that_is_not_finite_changes_nothing(tiny):
    backbone = tiny("qwen3")
    model, optimizer = LLM2VecGenModel(backbone.architecture, K, 0, 6), make_optimizer(config.OptimizerConfig())
    trained = compressor.init_trainable(model.compressor, jax.random.key(0), backbone.frozen["embedding"])
    state = TrainState(np.int32(3), trained, optimizer.init(trained))
    batch = {
        "query_lengths": np.array([5, 2], np.int32),
        "answer": np.full((2, 8), 9, np.int32),
        "answer_lengths": np.array([8, 1], np.int32),
        "target": np.zeros((2, 6), np.float32),
    }
    batch["query"] = model.prefill(backbone.frozen, np.full((2, 8), 7, np.int32), batch["query_lengths"], slots=8)
    step = functools.partial(train_step, model=model, optimizer=optimizer, loss_config=config.LossConfig())
    step = jax.jit(step)
    after, metrics = step(state, backbone.frozen, batch)
    assert np.isfinite(metrics["loss"]) and after.step == 4
    batch["target"][1, 2] = np.inf
    after, metrics = step(state, backbone.frozen, batch)
    assert np.isinf(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_training_starts_from_another_model(run, finished):
    still = ("train.steps=1", "train.init_from=run/model", "optimizer.learning_rate=0", "train.output=still")
    jax.tree.map(np.testing.assert_array_equal, trainable(run(*still), 1), trainable(finished, 2))
    with pytest.raises(InputError, match="train.init_from=run/model: .*num_tokens: 4 -> 5"):
        run("train.steps=1", "train.init_from=run/model", "compression.num_tokens=5", "train.output=other")


def test_a_new_lora_starts_without_an_effect_on_another_model(run, finished):
    still = ("train.steps=1", "train.init_from=run/model", "optimizer.learning_rate=0", "train.output=still")
    found = dict(trainable(run(*still, "lora.rank=2"), 1))
    for pair in found.pop("lora").values():
        assert np.abs(pair["a"]).max() > 0 and not np.any(pair["b"])
    jax.tree.map(np.testing.assert_array_equal, found, dict(trainable(finished, 2)))
    with pytest.raises(InputError, match="train.init_from=still/model: .*lora_rank: 2 -> 0"):
        run("train.steps=1", "train.init_from=still/model", "train.output=other")


# Microbatches


def assert_equal_but_for_rounding(run, other):
    for one, two in zip(read_metrics(run), read_metrics(other), strict=True):
        for name in one.keys() - {"tokens_per_second"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_microbatches_change_rounding_only(place, run, tiny_folder):
    """On one device and on two, where a device keeps its rows."""
    words = "train.steps=2", "optimizer.learning_rate=0.01", "loss.repeat=0.5"
    whole = run(*words)
    assert_equal_but_for_rounding(run(*words, "train.microbatches=4", "train.output=parts"), whole)
    mesh = sharding.make_mesh(config.MeshConfig(data=2), jax.devices()[:2])
    backbone = load_backbone(str(tiny_folder("qwen3")), "float32", mesh)
    on_two = run(*words, "train.microbatches=4", "train.output=two", backbone=backbone)
    assert_equal_but_for_rounding(on_two, whole)


@pytest.mark.slow
def test_microbatches_of_lora_change_rounding_only(place, run):
    words = "train.steps=2", "optimizer.learning_rate=0.01", "lora.rank=2", "lora.dropout=0"
    assert_equal_but_for_rounding(run(*words, "train.microbatches=4", "train.output=parts"), run(*words))


def test_microbatches_need_less_memory(tiny):
    def temporary(microbatches):
        backbone = tiny("qwen3")
        model = LLM2VecGenModel(backbone.architecture, K, 0, 32, execution=backbone.execution)
        settings = config.TrainConfig()
        settings.train.microbatches = microbatches
        state = jax.eval_shape(
            lambda: new_state(model.init(jax.random.key(0), backbone.frozen), make_optimizer(settings.optimizer))
        )
        ids, lengths = jax.ShapeDtypeStruct((16, 64), np.int32), jax.ShapeDtypeStruct((16,), np.int32)
        batch = {"answer": ids, "answer_lengths": lengths, "query_lengths": lengths}
        batch |= {"target": jax.ShapeDtypeStruct((16, 32), np.float32)}
        batch["query"] = jax.eval_shape(functools.partial(model.prefill, slots=64), backbone.frozen, ids, lengths)
        program = jit_step(settings, model).lower(state, backbone.frozen, batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(1) / 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.microbatches=3"], "train.batch_size=8 is not divisible by train.microbatches=3"),
        (["loss.margin=0.1"], "train.microbatches=2: loss.margin compares all rows of a batch; pass .*loss.margin=0"),
        (["loss.contrastive=0.1"], "train.microbatches=2: loss.contrastive compares all rows"),
        (["train.microbatches=0"], "train.microbatches"),
    ],
)
def test_microbatches_that_cannot_be_are_named(place, run, words, message):
    with pytest.raises(InputError, match=message):
        run("train.steps=1", "train.microbatches=2", *words)


# The model directory


def test_the_model_directory_encodes_as_the_trained_tree(place, run, tiny, tiny_folder):
    folder = run("train.steps=3", "optimizer.learning_rate=0.01", "compression.num_thought_tokens=2")
    backbone = tiny("qwen3")
    texts = ["", "a", "What is 3?", "long " * 20]
    ids = backbone.tokenizer.encode(texts, 512 - K - 2)
    lengths = np.array([len(row) for row in ids], np.int32)
    model = LLM2VecGenModel(backbone.architecture, K, 2, 32)
    encode = jax.jit(functools.partial(model.encode, trainable(folder, 3)))
    embeddings, soft_prompts = encode(backbone.frozen, buckets.pad(ids, lengths.max()), lengths)
    loaded = LLM2VecGen.from_pretrained(folder / "model", dtype="float32")
    found, found_prompts = loaded.encode(texts, return_soft_prompts=True)
    np.testing.assert_allclose(found, embeddings, atol=1e-5)
    np.testing.assert_allclose(found_prompts, soft_prompts, atol=1e-5)
    assert np.abs(found[1] - found[2]).max() > 1e-3
    assert loaded.backbone.name == str(tiny_folder("qwen3")) and loaded.get_embedding_dimension() == 32
    card = (folder / "model/README.md").read_text()
    assert "24 records of queries and responses" in card and "3 steps at batch 8" in card
    assert "num_thought_tokens: 2" in card and "| reconstruction loss |" in card


def test_a_model_on_another_backbone_is_refused(place, run, finished, tiny_folder):
    with pytest.raises(InputError, match="was trained on another backbone"):
        LLM2VecGen.from_pretrained(finished / "model", backbone=tiny_folder("llama"))
    with pytest.raises(InputError, match="was trained on another backbone"):
        run("train.steps=1", "train.init_from=run/model", "train.output=b", backbone=other_weights(place()))


def other_weights(folder):
    """The tiny backbone with one projection changed: embeddings and norms, which tuning often keeps, are equal."""
    import torch

    model = tiny_torch_model("qwen3")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.5)
    model.save_pretrained(folder / "tuned")
    tiny_tokenizer().save_pretrained(folder / "tuned")
    return load_backbone(str(folder / "tuned"), "float32", one_device_mesh())
