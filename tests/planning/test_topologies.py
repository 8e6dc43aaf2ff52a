"""Described devices: names, memory, and compilation."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.parallel import memory, sharding
from llm2vec_gen_jax.parallel.chips import CHIPS, chip_of
from llm2vec_gen_jax.planning import topologies

NAMES = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
    "Tesla T4": "t4",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100-80gb-pcie",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA GH200 120GB": "gh200",
    "NVIDIA GH200 144G HBM3e": "gh200-144gb",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
}
UNKNOWN = ("cpu", "TPU v2", "TPU v4 lite", "TPU v50", "NVIDIA L40", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA B2000")
UNKNOWN += ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "Radeon", "gfx942", "AMD Instinct MI300X", "NVIDIA A1000", "Tesla T40")


def test_chips_are_known_by_the_names_of_devices():
    assert {name: chip_of(name) for name in NAMES} == {name: CHIPS[kind] for name, kind in NAMES.items()}
    assert set(NAMES.values()) == set(CHIPS)
    assert [name for name in UNKNOWN if chip_of(name)] == []


@pytest.mark.parametrize("kind", sorted(topologies.TARGETS))
def test_targets_match_their_chips(kind):
    text = topologies.TARGETS[kind].read_text()
    chip = chip_of(re.search(r'device_description_str: "(.*)"', text)[1])
    assert chip is CHIPS[kind]
    memory, bandwidth = (
        int(re.search(rf"{key}: (\d+)", text)[1]) for key in ("device_memory_size", "memory_bandwidth")
    )
    np.testing.assert_allclose((memory, bandwidth), (chip.memory, chip.bandwidth), rtol=1e-3)


def test_the_help_lists_every_target():
    listed = re.search(r"h100:2x8 \(two\) with (.*?);", config.PlanConfig.__doc__, re.S)[1]
    assert re.sub(r"\s", "", listed).split(",") == sorted(topologies.TARGETS)


@pytest.mark.parametrize(
    "settings, share",
    [
        ({}, 0.75),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".95"}, 0.95),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, 0.5),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, 0.75),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, 1.0),
    ],
)
def test_memory_limit_of_training(gpu_compiler, monkeypatch, settings, share):
    for key in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_ALLOCATOR"):
        monkeypatch.delenv(key, raising=False)
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    mesh = sharding.make_mesh(config.MeshConfig(), topologies.described_devices("h100:2x8")[0])
    np.testing.assert_allclose(memory.limit(mesh), 0.92 * share * CHIPS["h100"].memory)


@pytest.mark.parametrize(
    ("shape", "order", "expected"),
    [
        ((16, 1, 1), range(16), [(0, 2), (1, 2)]),
        ((2, 2, 4), range(16), [(0, 2), (1, 2)]),
        ((1, 1, 16), range(16), [(0, 1), (0, 1)]),  # a tensor-parallel group of both processes
        ((2, 1, 8), [*range(0, 16, 2), *range(1, 16, 2)], [(0, 1), (0, 1)]),
        ((16, 1, 1), [*range(0, 16, 2), *range(1, 16, 2)], [(0, 2), (1, 2)]),
        ((8, 1, 2), [0, 8, *range(1, 8), *range(9, 16)], None),  # the processes share one group of eight
    ],
)
def test_the_part_of_a_batch_that_a_process_has(gpu_compiler, monkeypatch, shape, order, expected):
    devices = np.array(topologies.described_devices("h100:2x8")[0])
    mesh = jax.sharding.Mesh(devices[[*order]].reshape(shape), sharding.MESH_AXES)
    found = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        if expected is None:
            with pytest.raises(InputError, match="mesh.data=8, .*: 2 processes cannot have parts of a batch"):
                sharding.batch_part(mesh)
        else:
            found.append(sharding.batch_part(mesh))
    assert found == (expected or [])


@pytest.mark.parametrize("value", ["most", "0", "1.5", "90%"])
def test_a_bad_memory_fraction_is_an_error(monkeypatch, value):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", value)
    with pytest.raises(InputError, match=f"XLA_PYTHON_CLIENT_MEM_FRACTION={value}: expected a fraction"):
        memory.pool_share()


def test_a_cpu_has_no_memory_limit():
    assert memory.limit(None) is None
    np.testing.assert_allclose(memory.limit(None, CHIPS["l4"]), 0.92 * 0.75 * CHIPS["l4"].memory)


def test_a_plugin_for_another_jax_is_an_error(tmp_path, monkeypatch):
    for name in ("plugin", "pjrt"):
        (folder := tmp_path / f"jax_cuda13_{name}-0.1.2.dist-info").mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: jax-cuda13-{name}\nVersion: 0.1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = f"the CUDA plugin 0.1.2 is not for jax {jax.__version__}: pip install jax-cuda13-pjrt=={jax.__version__}"
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        topologies.described_devices("h100:8")


def attention_hlo(topology, head_dim):
    """Returns the HLO of cuDNN's attention and its gradient."""
    devices, _, _ = topologies.described_devices(topology)
    put = jax.NamedSharding(jax.sharding.Mesh(devices, ("x",)), jax.P())

    def loss(q):
        mixed = jax.nn.dot_product_attention(q, q, q, is_causal=True, implementation="cudnn")
        return jnp.sum(mixed.astype(jnp.float32))

    with topologies.compiling_for(devices):
        jitted = jax.jit(jax.grad(loss))
        return jitted.lower(jax.ShapeDtypeStruct((2, 64, 2, head_dim), jnp.bfloat16, sharding=put)).compile().as_text()


def test_flash_attention_uses_the_described_compute_capability(gpu_compiler):
    assert attention_hlo("a100", 128).count("__cudnn$fmha") >= 2
    assert "__cudnn$fmha" in attention_hlo("h100", 256)
    with pytest.raises(NotImplementedError, match="head dim must be <= 128"):
        attention_hlo("a100", 256)


def test_compiling_for_restores_the_state_of_jax(gpu_compiler):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    before = (
        cudnn.check_cudnn_version,
        cudnn.check_compute_capability,
        jax.config.values["jax_enable_compilation_cache"],
    )
    with pytest.raises(ZeroDivisionError), topologies.compiling_for(topologies.described_devices("b200")[0]):
        assert cudnn.check_compute_capability("9.0") and not jax.config.values["jax_enable_compilation_cache"]
        raise ZeroDivisionError
    after = cudnn.check_cudnn_version, cudnn.check_compute_capability, jax.config.values["jax_enable_compilation_cache"]
    assert before == after


def test_gpus_are_described_after_jax_looked_for_devices(gpu_compiler):
    """Without JAX_PLATFORMS, jax tries to load the plugin and fails because NVIDIA's libraries are missing."""
    code = (
        "import jax, json; here = jax.devices()[0].platform; from llm2vec_gen_jax.planning import topologies;"
        "devices, _, compiler = topologies.described_devices('h100:2x4');"
        "print(json.dumps([here, devices[0].device_kind, devices[-1].process_index, compiler]))"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment |= {"TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, kind, process, compiler = json.loads(done.stdout.splitlines()[-1])
    assert (kind, process) == ("NVIDIA H100 80GB HBM3", 1) and compiler.startswith("XLA:GPU (cuda plugin ")
