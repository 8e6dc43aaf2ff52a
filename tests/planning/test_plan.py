"""Plans: memory, FLOPs and bytes of collectives, compared with XLA's counts and with manual calculation."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import read_json
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.model.architecture import from_hf_config
from llm2vec_gen_jax.model.execution import REMAT, Execution
from llm2vec_gen_jax.parallel.chips import CHIPS, GIB, Chip
from llm2vec_gen_jax.planning import plan, topologies
from llm2vec_gen_jax.planning.hlo import moved_bytes
from llm2vec_gen_jax.planning.programs import abstract_inputs, compile_programs, flops
from tests.conftest import one_device_mesh

SHAPES = pathlib.Path(__file__).parents[2] / "configs" / "architectures"
SIZES = {"qwen3-0.6b": 0.60, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19, "llama3.1-8b": 8.03}
SIZES |= {
    "llama3-70b": 70.55,
    "smollm2-135m": 0.13,
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-7b": 7.62,
    "llama3.2-1b": 1.24,
}  # billions


def planned(*arguments):
    """Returns the rows of a plan, by default of the tiny architecture."""
    return plan.estimate(options.load(config.PlanConfig, None, arguments))


@pytest.fixture
def tiny_words(tiny_folder):
    """Arguments of a small plan of the tiny Qwen3 (2 key/value heads)."""
    path = tiny_folder("qwen3") / "config.json"
    return f"architecture={path}", "query_length=32", "answer_length=48", "train.batch_size=16"


@pytest.mark.parametrize("path", sorted(SHAPES.glob("*.json")), ids=lambda path: path.stem)
def test_sizes_of_known_architectures(path):
    assert round(from_hf_config(read_json(path), path).num_parameters / 1e9, 2) == SIZES[path.stem]


def compiled_over(mesh, function, *arguments, out=(), options=None):
    """Returns the HLO of a function; arrays: (shape, spec) of its arguments."""
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
        for shape, spec in arguments
    ]
    jitted = jax.jit(function, out_shardings=jax.NamedSharding(mesh, jax.P(*out)), compiler_options=options)
    with topologies.compiling_for(list(mesh.devices.flat)):
        return jitted.lower(*shapes).compile().as_text()


def mesh_of(devices):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices)


def test_bytes_of_collectives():
    mesh = mesh_of(jax.devices())
    size = 16 * 64 * 4
    assert moved_bytes(compiled_over(mesh, lambda x: x, ((16, 64), ("b",)))) == size * 3 / 4  # gathered over 4
    assert moved_bytes(compiled_over(mesh, lambda x: x, ((16, 64), ()))) == 0
    product = compiled_over(mesh, jnp.matmul, ((16, 32), (None, "a")), ((32, 64), ("a",)))
    assert moved_bytes(product) == 2 * size / 2  # summed over 2

    def layers(x, weights):
        def layer(x, weight):
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(layer, x, weights)[0]

    looped = compiled_over(mesh, layers, ((4, 64), ()), ((5, 64, 64), (None, None, "b")))
    assert moved_bytes(looped) == (5 + 1) * (4 * 64 * 4) * 3 / 4  # the input of every iteration, and the result


@pytest.mark.parametrize("double_buffering", [False, True])
@pytest.mark.parametrize("num_layers", [5, 6])
def test_bytes_of_collectives_in_loops_of_a_gpu_program(gpu_compiler, num_layers, double_buffering):
    """The loop's bound stands in a fused comparison; with double buffering a round has two layers, and some are peeled
    off."""
    mesh = mesh_of(topologies.described_devices("h100:8")[0])

    def layers(x, weights):
        def layer(x, weight):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, jax.NamedSharding(mesh, jax.P()))), None

        return jax.lax.scan(layer, x, weights)[0]

    options = ("xla_gpu_enable_pipelined_all_gather", "xla_gpu_enable_while_loop_double_buffering")
    options = dict.fromkeys(options, double_buffering)
    arguments = ((128, 256), ("a",)), ((num_layers, 256, 256), (None, "b"))
    hlo = compiled_over(mesh, layers, *arguments, out=("a",), options=options)
    assert moved_bytes(hlo) == num_layers * (256 * 256 * 4) * 3 / 4
    assert moved_bytes(hlo.replace('"known_trip_count"', '"unknown"')) > 0


def test_asynchronous_collectives_are_counted_once(gpu_compiler):
    mesh = mesh_of(topologies.described_devices("h100:8")[0])
    size = 64 * 256 * 4
    assert moved_bytes(compiled_over(mesh, lambda x: x, ((64, 256), ("b",)), out=(None, "b"))) == size / 4 * 3 / 4
    assert moved_bytes(compiled_over(mesh, lambda x: x, ((64, 256), ("b",)))) == size * 3 / 4
    product = ((64, 32), (None, "b")), ((32, 256), ("b",))
    assert moved_bytes(compiled_over(mesh, jnp.matmul, *product)) == 2 * size * 3 / 4
    assert moved_bytes(compiled_over(mesh, jnp.matmul, *product, out=("b",))) == size * 3 / 4


def test_wrapped_collectives_are_counted_at_their_start():
    wrapped = """
%wrapped (p: f32[16,64]) -> f32[16,64] {
  ROOT %all-to-all = f32[16,64]{1,0} all-to-all(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: f32[16,64]) -> f32[16,64] {
  %start = ((f32[16,64]{1,0}), f32[16,64]{1,0}, u32[]) async-start(%x), calls=%wrapped
  %update = ((f32[16,64]{1,0}), f32[16,64]{1,0}, u32[]) async-update(%start), calls=%wrapped
  ROOT %done = f32[16,64]{1,0} async-done(%update), calls=%wrapped
}
"""
    assert moved_bytes(wrapped) == 16 * 64 * 4 * 3 / 4


def test_flops_match_xla(tiny_words):
    """With one layer, because XLA counts the body of a loop once."""
    settings = options.load(config.PlanConfig, None, [*tiny_words, "loss.chunk_tokens=100000"])
    shape = json.loads(pathlib.Path(settings.architecture).read_text()) | {"num_hidden_layers": 1}
    shape |= {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2048}
    architecture = from_hf_config(shape, "here")
    programs = compile_programs(
        settings, *abstract_inputs(settings, architecture, Execution(one_device_mesh(), remat="none"))
    )
    counted = {name: program.compiled.cost_analysis()["flops"] for name, program in programs.items()}
    step, encode = flops(settings, architecture)
    np.testing.assert_allclose(counted["prefix"] + counted["step"], step, rtol=0.15)
    np.testing.assert_allclose(counted["encode"], encode, rtol=0.15)


@pytest.mark.slow
def test_a_mesh_divides_the_weights(tiny_words):
    (whole,) = planned(*tiny_words, "topology=cpu:1")
    (split,) = planned(*tiny_words, "topology=cpu:8", "mesh.fsdp=4", "mesh.data=1", "mesh.tensor=2")
    assert whole["moved"] == 0 < split["moved"]
    matrices = whole["weights"] - split["weights"]
    assert whole["weights"] * 0.8 < matrices * 8 / 7 <= whole["weights"]  # all but the norms
    assert split["train"] < whole["train"] / 3
    (copied,) = planned(*tiny_words, "topology=cpu:8")
    assert copied["weights"] == whole["weights"] and copied["moved"] < split["moved"]


def test_activations_are_sharded_over_the_batch_only(tiny_words):
    """With fsdp, devices gather weights; no all-reduce of activations is left."""
    settings = options.load(config.PlanConfig, None, [*tiny_words, "backbone.dtype=float32", "mesh.fsdp=8"])
    architecture = plan._architecture(settings)
    mesh = plan.sharding.make_mesh(settings.mesh, plan._devices("cpu:8")[0])
    programs = compile_programs(settings, *abstract_inputs(settings, architecture, Execution(mesh)))
    gathered = architecture.num_parameters * 4 * 7 / 8
    assert programs["prefix"].moved < 1.2 * gathered
    assert "all-reduce" not in programs["prefix"].compiled.as_text()


@pytest.mark.slow
def test_remat_policies_trade_memory(tiny_words):
    peaks = [planned(*tiny_words, "topology=cpu:1", f"train.remat={name}")[0]["train"] for name in REMAT]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 1.2 * peaks[-1]


@pytest.mark.usefixtures("gpu_compiler")
def test_old_gpus_use_float32_without_cudnn(tiny_words, capsys):
    with pytest.raises(InputError, match="kernels.attention=cudnn: needs an NVIDIA GPU of compute capability 8.0"):
        planned(*tiny_words, "topology=t4", "kernels.attention=cudnn")
    assert ", float32; t4;" in capsys.readouterr().out


def test_a_plan_for_gpus_uses_the_gpu_compiler(gpu_compiler, tiny_words, capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    (row,) = planned(*tiny_words, "topology=h100:2x4", "mesh.fsdp=4", "train.remat=dots", "query_length=64")
    shown = capsys.readouterr().out
    assert row["compiler"].startswith("XLA:GPU (cuda plugin ") and row["compiler"] in shown.splitlines()[-1]
    assert row["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1} and row["fits"] and row["moved"] > 0
    assert row["compiled_flops"] is None and row["flops"] > 0
    np.testing.assert_allclose(row["limit"], 0.92 * 0.9 * 84929347584, rtol=1e-3)
    assert (
        f"{row['limit'] / GIB:.2f} GiB per device, 92 % of the memory available to JAX, which is 90% of the device's"
        in " ".join(shown.split())
    )


def test_without_the_plugin_a_plan_is_an_estimate(monkeypatch):
    version = topologies._version
    monkeypatch.setattr(topologies, "_version", lambda name: None if "cuda" in name else version(name))
    devices, chip, compiler = plan._devices("h100:2x4")
    assert len(devices) == 8 and {device.platform for device in devices} == {"cpu"}
    assert (chip, compiler) == (CHIPS["h100"], "XLA:CPU estimate")
    shown = plan._describe_compiler(compiler, 58 * GIB, "cpu")
    assert "compiled by XLA:CPU estimate" in shown and "75% of the device's" in shown
    assert f"pip install jax-cuda13-pjrt=={version('jaxlib')} jax-cuda13-plugin=={version('jaxlib')}" in shown


def test_described_devices_cannot_be_measured(gpu_compiler, tiny_words):
    with pytest.raises(InputError, match="topology=h100:1: measure=true runs programs"):
        planned(*tiny_words, "topology=h100:1", "measure=true")


def test_the_memory_of_a_cpu_is_measured_on_linux_only(tiny_words, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="measure=true: the memory of a CPU can only be measured on Linux"):
        planned(*tiny_words, "topology=cpu:1", "measure=true")


def test_a_search_leaves_out_meshes_that_do_not_divide_the_weights(tiny_words, tiny_folder):
    settings = options.load(config.PlanConfig, None, tiny_words)
    architecture = from_hf_config(read_json(tiny_folder("qwen3") / "config.json"), "tiny")
    assert {mesh.tensor for mesh, _ in plan._candidates(settings, architecture, 4, None)} == {1, 2}
    odd = dataclasses.replace(architecture, vocab_size=301)
    assert {mesh.tensor for mesh, _ in plan._candidates(settings, odd, 4, None)} == {1}


def test_auto_is_float32_for_a_t4_without_the_gpu_compiler(tiny_words, monkeypatch, capsys):
    version = topologies._version
    monkeypatch.setattr(topologies, "_version", lambda name: None if "cuda" in name else version(name))
    planned(*tiny_words, "topology=t4")
    assert ", float32; t4;" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_search_returns_the_first_mesh_that_fits(tiny_words, monkeypatch, capsys, tmp_path):
    arguments = (*tiny_words, "topology=h100:4", "search=true", f"output={tmp_path / 'rows.jsonl'}")
    rows = planned(*arguments)
    assert [row["fits"] for row in rows] == [True] and rows[0]["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert "use: mesh.data=4 mesh.fsdp=1 mesh.tensor=1 train.remat=dots" in capsys.readouterr().out
    small = Chip(1e12, rows[0]["train"] * 0.9 / (0.92 * 0.75), 1e9, 1e9)
    monkeypatch.setitem(CHIPS, "h100", small)
    rows += planned(*arguments)
    assert [row["fits"] for row in rows[1:]] == [False] * (len(rows) - 2) + [True]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    monkeypatch.setitem(CHIPS, "h100", Chip(1e12, 1.2 * rows[-1]["weights"], 1e9, 1e9))
    assert not any(row["fits"] for row in planned(*arguments))
    assert "no configuration fits" in capsys.readouterr().out


@pytest.mark.slow
def test_the_measured_peak_is_near_the_estimate(tiny_words, capsys):
    """Without the arguments, on a CPU."""
    arguments = ("topology=cpu:1", "query_length=128", "answer_length=256", "train.batch_size=64", "measure=true")
    planned(tiny_words[0], *arguments)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "measured" in line]
    measured = {line[0]: (float(line[2]), float(line[5])) for line in lines}
    assert set(measured) == {"prefix", "step", "encode", "generate"}
    np.testing.assert_allclose(*measured["step"], rtol=0.4)  # the process allocates memory, too


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["topology=v5e"], "topology=v5e: expected KIND:SHAPE"),
        (["topology=h10:8"], "did you mean 'h100'"),
        (["topology=v5ee:2x2"], "did you mean 'v5e'"),
        (["topology=cpu:0"], "expected KIND:SHAPE"),
        (["topology=cpu:2x2"], "expected KIND:SHAPE"),
        (["topology=h100:8x"], "expected KIND:SHAPE"),
        (["topology=h100:2x4x8"], "expected KIND:SHAPE"),
        (["topology=h100:-8"], "expected KIND:SHAPE"),
        (["topology=h100:0x8"], "expected KIND:SHAPE"),
        (["topology=h100:999999"], "expected KIND:SHAPE"),
        (["topology=cpu:8", "mesh.tensor=8"], "kv_heads dimension of 2 is not divisible by mesh.tensor=8"),
        (["topology=cpu:3"], "train.batch_size=16 is not divisible by 3 data shards"),
        (["topology=v5e:3x5"], "topology=v5e:3x5: .*(pip install libtpu|as v5e:4x4)"),
        (["architecture=none.json"], "none.json: no such file"),
    ],
)
def test_errors_of_plans(tiny_words, arguments, message):
    with pytest.raises(InputError, match=message):
        planned(*tiny_words, *arguments)
