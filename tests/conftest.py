"""Shared by all tests: fake devices, tiny random backbones of every family, the real default backbone."""

import gc
import os
import pathlib
from importlib import metadata

# An unknown flag would end the process, so other versions compile more slowly.
COMPILE_FAST = "--xla_cpu_use_fusion_emitters=false" if metadata.version("jaxlib").startswith("0.10.") else ""

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Several threads of PyTorch or a BLAS spin at barriers: many times slower beside other workers. Children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most of the time of the tests goes into compiling tiny programs. Without LLVM's optimizations and the fusion emitters,
# a step of training compiles in a fifth of the time. Processes that the tests start inherit both; tests of the real
# model compile programs as users get them (`optimized`).
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", f"{COMPILE_FAST} --xla_force_host_platform_device_count=8")

import jax  # noqa: E402
import pytest  # noqa: E402

from llm2vec_gen_jax import config
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.planning import topologies  # noqa: E402
from llm2vec_gen_jax.pretrained.backbone import load_backbone  # noqa: E402
from llm2vec_gen_jax.pretrained.default_backbone import cache_folder  # noqa: E402
from tests.helpers.tiny import tiny_tokenizer  # noqa: E402

# Garbage collection takes a sixth of the time of tracing otherwise, more with every module and program that is loaded.
gc.set_threshold(50_000)
jax.config.update("jax_numpy_rank_promotion", "allow")
jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled-tests"))

TESTS = pathlib.Path(__file__).parent
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = ("llama", "llama3", "qwen2", "qwen3")
# The files that take longest (over 20 s of one core), longest first: they start first, so that no worker is left alone
# with one of them at the end.
LONGEST = """
parity/test_parity parallel/test_preemption parity/test_convert planning/test_accelerators parallel/test_multihost
integrations/test_convert_command experiments/test_study training/test_train training/test_validation
commands/test_bad_input inference/test_encode serving/test_bulk_faults common/test_locks training/test_supervised
parallel/test_sharding pretrained/test_tokenizer project/test_written_before parallel/test_devices
project/test_examples training/test_train_teacher inference/test_respond model/test_backbone commands/test_commands
config/test_config lens/test_lens serving/test_serve_process model/test_attention
integrations/test_sentence_transformers_folder planning/test_plan pretrained/test_hub inference/test_openai_engine
pretrained/test_export inference/test_generate training/test_programs training/test_trainer inference/test_overflow
""".split()


def pytest_configure(config):
    config.option.loadscopereorder = False  # `--dist loadfile` keeps the order of the files


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    place = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.relative_to(TESTS).as_posix(), len(place)))


def one_device_mesh():
    """The mesh (1, 1, 1)."""
    return sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])


def tiny_torch_model(family, **changes):
    """A random torch causal LM in float32: 3 layers, hidden 32, 4 query and 2 key/value heads, 264 rows."""
    import torch
    import transformers

    settings = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "tie_word_embeddings": family != "llama",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.2,
    }
    if family == "llama3":
        settings["rope_parameters"] = LLAMA3_ROPE | {"rope_theta": 500000.0}
    if family == "qwen2":
        del settings["head_dim"]  # Qwen2's config has no such field
    if family == "qwen3":
        settings["head_dim"] = 16  # explicit: heads * head_dim is not hidden_size
    settings |= changes
    torch.manual_seed(0)
    name = {"llama": "Llama", "llama3": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)  # otherwise ones and zeros hide mistakes
    return model.float().eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """family -> the Hugging Face folder of a tiny random model with its tokenizer, made once."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_torch_model(family).save_pretrained(made[family])
            tiny_tokenizer().save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """family -> the tiny model, loaded on one device in float32."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = load_backbone(str(tiny_folder(family)), "float32", one_device_mesh())
        return made[family]

    return make


@pytest.fixture(scope="session")
def embedder(tiny):
    """An untrained embedder on the tiny Qwen3."""
    from tests.helpers.embedders import embedder_on

    return embedder_on(tiny("qwen3"))


@pytest.fixture(scope="session")
def model_folder(embedder, tmp_path_factory):
    """Its model directory."""
    from llm2vec_gen_jax.pretrained import model_directory

    path = tmp_path_factory.mktemp("embedder") / "model"
    model_directory.save(path, embedder.model, embedder.trainable, embedder.backbone, {}, [])
    return path


@pytest.fixture(scope="session")
def talker_folder(tmp_path_factory):
    """A tiny random LLM that ends a turn about every twentieth token: dimension 0 is a constant that says so."""
    import torch

    folder = tmp_path_factory.mktemp("talker")
    model = tiny_torch_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        model.model.norm.weight[0] = 1
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[2, 0] = 1.5
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def talker(talker_folder):
    """That LLM on one device."""
    return load_backbone(str(talker_folder), "float32", one_device_mesh())


@pytest.fixture(scope="module")
def task_folders(tmp_path_factory):
    """A folder of small tasks, one of each type."""
    from tests.helpers.tasks import TYPES, write_task

    folder = tmp_path_factory.mktemp("tasks")
    for kind in TYPES:
        write_task(folder / kind, kind)
    return folder


@pytest.fixture
def responses(tmp_path):
    """A responses file, beside which targets are kept."""
    from tests.helpers.adapters import ANSWERS

    return write_jsonl(tmp_path / "responses.jsonl", [{"answer": answer} for answer in ANSWERS])


@pytest.fixture(scope="module")
def optimized():
    """From here on the module compiles with XLA's own optimisations."""
    from jax._src import compiler  # jax has no setting for compiler options of all programs

    def get_compile_options(*arguments, env_options_overrides=None, **options):
        overrides = ({"xla_cpu_use_fusion_emitters": True} if COMPILE_FAST else {}) | (env_options_overrides or {})
        return defaults(*arguments, env_options_overrides=overrides, **options)

    defaults, key = compiler.get_compile_options, "jax_disable_most_optimizations"
    before = jax.config.values[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", get_compile_options)
        jax.config.update(key, False)
        jax.clear_caches()
        yield
        jax.config.update(key, before)
    jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2():
    """The real default backbone on one device in float32."""
    return load_backbone("smollm2-135m", "float32", one_device_mesh())


@pytest.fixture(scope="session")
def smollm2_torch(smollm2, tmp_path_factory):
    """The real default backbone in torch, float32, by way of a saved Hugging Face folder."""
    import transformers

    from llm2vec_gen_jax.formats import hf

    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    hf.save(folder, smollm2.frozen, smollm2.architecture, smollm2.tokenizer.save, smollm2.tokenizer.stop_ids)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def torch_outputs(model, rows, causal=True):
    """[(last hidden states (n, D), logits (n, V))] of id lists of n tokens: one right-padded batch in torch."""
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    if not causal:  # a 4-D mask is added to the scores as it is
        unseen = (mask == 0)[:, None, None, :].expand(-1, 1, longest, -1)
        mask = torch.zeros(unseen.shape).masked_fill(unseen, torch.finfo(torch.float32).min)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = model.lm_head(hidden)
    return [(hidden[b, : len(row)].numpy(), logits[b, : len(row)].numpy()) for b, row in enumerate(rows)]


def write_jsonl(path, rows):
    """Writes objects as JSON lines; returns the path."""
    import json

    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# Tiny programs compile in under a second each, but there are many of them: keep those too.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

import hypothesis  # noqa: E402

# Hypothesis would call a test slow because the machine is busy.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")
TMP_PATH = hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])


@pytest.fixture
def messages(caplog):
    """messages() returns what the library has logged since the last call; commands print it."""
    caplog.set_level("INFO", "llm2vec_gen_jax")

    def read():
        text = "\n".join(caplog.messages)
        caplog.clear()
        return text

    return read


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """command(name, *words) runs `python -m launch.NAME WORDS` in this process, in an empty directory.

    Returns (exit code, standard output, standard error).
    """
    import runpy
    import sys

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)

    def run(name, *words):
        name, *action = name.split()
        monkeypatch.setattr(sys, "argv", [f"launch.{name}", *action, *map(str, words)])
        monkeypatch.delitem(sys.modules, f"launch.{name}", raising=False)  # run afresh, whoever imported it
        capsys.readouterr()
        code = 0
        try:
            runpy.run_module(f"launch.{name}", run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def check_error(result, *expected, code=2):
    """A user's mistake: exit code 2 and one line that names the thing."""
    found, _, errors = result
    assert found == code, errors
    line = errors.strip().splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in errors
    assert errors.count("error: ") == 1 and errors.rstrip().endswith(line)
    for part in expected:
        assert str(part) in line


@pytest.fixture
def launch():
    """launch(folder, name, *words) starts `python -m launch.NAME WORDS` there, on one device; returns its Popen.

    Whatever still runs at the end of the test is ended.
    """
    import subprocess
    import sys

    from tests.helpers.processes import Process, environment

    started = []

    def start(folder, name, *words, torch=False, stdout=subprocess.PIPE):
        command = [sys.executable, "-m", f"launch.{name}", *words]
        pipes = {"stdout": stdout, "stderr": subprocess.PIPE, "text": True}
        started.append(Process(command, cwd=folder, env=environment(torch=torch), **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def gpu_compiler():
    """XLA's GPU compiler is installed; it needs no GPU."""
    if not topologies.described_devices("h100")[2].startswith("XLA:GPU"):
        if os.environ.get("CI"):
            pytest.fail("the GPU compiler is missing: pip install -r requirements-gpu-compiler.txt")
        pytest.skip("needs the GPU compiler: pip install -r requirements-gpu-compiler.txt")


@pytest.fixture(scope="session")
def peer_python():
    """The Python of the published package's environment."""
    import subprocess

    from tests.parity import peer

    try:
        return peer.python()
    except subprocess.CalledProcessError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the published package cannot be installed here: {error.stderr.strip().splitlines()[-1]}")
