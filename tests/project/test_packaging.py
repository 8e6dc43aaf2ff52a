"""The package as others get it: what the wheel holds, that it runs where no checkout is, and what it asks for."""

import ast
import importlib.metadata
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement

import llm2vec_gen_jax
from llm2vec_gen_jax import config
from llm2vec_gen_jax.commands import __main__ as launch_main
from llm2vec_gen_jax.common import files
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted([*(ROOT / "llm2vec_gen_jax").rglob("*.py"), *(ROOT / "launch").glob("*.py")])
# What is imported and not required: the Python of `convert verify` has it, or the message that names it does.
OPTIONAL = {"llm2vec_gen", "umap"}
# What is required and not imported.
WITHOUT_IMPORT = {
    "jax-cuda13-pjrt": "jax loads it as its plugin",
    "jax-cuda13-plugin": "jax loads it as its plugin",
    "h11": "uvicorn.protocols.http.h11_impl imports it",
    "sphinx": "builds the site of docs/",
    "myst-parser": "docs/conf.py names it",
    "sphinx-book-theme": "docs/conf.py names it",
    "torch": "mteb and sentence-transformers compute with it",
    "wandb": "imported only where runs are tracked with it",
    "trackio": "imported only where runs are tracked with it",
}


def names(lines):
    """{distribution name in its normal form: its requirement without the name, in its normal form}."""
    found = {}
    for line in lines:
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        found[name] = f"{sorted(requirement.extras)} {requirement.specifier}"
    return found


def of_file(path):
    """The requirements of a requirements file and of those that it names with -r."""
    found = {}
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            found |= of_file(path.parent / line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            found |= names([line])
    return found


def of_extra(name):
    """The requirements of an extra and of those that it names."""
    found = names(PROJECT["optional-dependencies"][name])
    inner = found.pop("llm2vec-gen-jax", "[] ")
    for other in re.findall(r"'([\w-]+)'", inner):
        found |= of_extra(other)
    return found


# One list


def test_the_requirements_files_are_the_extras():
    assert of_file(ROOT / "requirements.txt") == names(PROJECT["dependencies"])
    kinds = {path.stem.removeprefix("requirements-"): path for path in ROOT.glob("requirements-*.txt")}
    del kinds["peer"]  # the environment of another package
    assert {"eval", "serve", "study", "teachers", "test"} <= kinds.keys()
    for kind, path in kinds.items():
        assert of_file(path) == of_extra("dev" if kind == "test" else kind), path.name


def test_every_import_is_required_and_every_requirement_is_imported():
    imported = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    imported -= {*sys.stdlib_module_names, "llm2vec_gen_jax", "launch"}
    # A distribution's modules, by its metadata where it is installed, else by its name.
    modules = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            modules.setdefault(re.sub(r"[-_.]+", "-", distribution).lower(), set()).add(module)
    extras = (of_extra(name) for name in PROJECT["optional-dependencies"] if name != "dev")
    required = names(PROJECT["dependencies"]).keys() | {name for extra in extras for name in extra}
    provides = {name: modules.get(name, {name.removesuffix("-core").replace("-", "_")}) for name in required}
    provides["langchain-core"] = {"langchain_core"}
    assert imported - set().union(*provides.values()) == OPTIONAL
    idle = {name for name, own in provides.items() if not own & imported}
    assert idle <= WITHOUT_IMPORT.keys(), f"required and never imported: {sorted(idle - WITHOUT_IMPORT.keys())}"


def test_every_direct_dependency_is_reviewed():
    table = (ROOT / "docs" / "dependencies.md").read_text()
    reviewed = set(re.findall(r"^\| `([\w.-]+)`", table, re.MULTILINE))
    wanted = {re.sub(r"[\[<>=].*", "", line) for line in PROJECT["dependencies"]}
    for lines in PROJECT["optional-dependencies"].values():
        wanted |= {re.sub(r"[\[<>=].*", "", line) for line in lines}
    assert reviewed == wanted - {"llm2vec-gen-jax"}


def test_the_lock_fits_the_requirements():
    lines = (ROOT / "requirements-ci.lock").read_text().splitlines()
    lock = names(line for line in lines if line and not line.startswith("#"))
    files_of_ci = re.findall(r"-r (\S+)", (ROOT / ".ci" / "run").read_text())
    assert len(files_of_ci) > 3
    for file in files_of_ci:
        for name, wanted in of_file(ROOT / file).items():
            version = lock[name].split("==")[1]
            assert Requirement(f"x{wanted.split(' ', 1)[1]}").specifier.contains(version), f"{name} {version}"


def test_the_version_is_told_once():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == llm2vec_gen_jax.__version__ and cited["license"] == "MIT"
    assert f"\n## {llm2vec_gen_jax.__version__} - " in (ROOT / "CHANGELOG.md").read_text()
    assert "version" not in PROJECT


def test_every_requirement_of_version_0_has_an_upper_bound():
    lists = [names(PROJECT["dependencies"]), *(of_extra(name) for name in PROJECT["optional-dependencies"])]
    own = {"pytest-xdist", "ruff", "mypy", "httpx", "playwright"}  # of development: the lock has their versions
    for name, wanted in {name: text for requirements in lists for name, text in requirements.items()}.items():
        lowest = re.search(r">=(0\.)", wanted)
        assert not lowest or "<" in wanted or name in own, f"{name} {wanted}"


def test_what_is_redistributed_is_in_the_notice():
    """Each folder of weights and foreign data is named, exists, and its license is in the repository and the wheel."""
    notice = (ROOT / "NOTICE").read_text()
    listed = re.findall(r"^(\w+/\S+)$", notice, flags=re.M)
    assert all((ROOT / path).exists() for path in listed)
    assets = ROOT / "llm2vec_gen_jax" / "pretrained" / "assets"
    weights = {path for kind in ("*.safetensors", "tokenizer.json") for path in assets.rglob(kind)}
    assert len(weights) > 4
    for path in weights:
        assert any(path.is_relative_to(ROOT / folder) for folder in listed), f"{path}: whose is it?"
    assert PROJECT["license"] == "MIT AND Apache-2.0"
    held = {path for pattern in PROJECT["license-files"] for path in ROOT.glob(pattern)}
    assert held == {ROOT / "LICENSE", ROOT / "NOTICE", ROOT / "LICENSES" / "Apache-2.0.txt"}
    card = (assets / "models" / "smollm2-135m" / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card


def test_the_description_on_pypi_has_no_relative_links():
    """On PyPI, links lead to the repository, or, while it has no address, only their texts remain."""
    readme = (ROOT / "README.md").read_text()
    absolute_links = runpy.run_path(str(ROOT / "setup.py"))["absolute_links"]
    link = re.compile(r"\]\(([^)]*)\)")
    assert not [target for target in link.findall(absolute_links(readme, None)) if "://" not in target]
    shown = absolute_links(readme, "https://example.org/one/two/")
    assert len(link.findall(shown)) == len(link.findall(readme)) > 30
    assert all("://" in target for target in link.findall(shown))
    assert "(https://example.org/one/two/raw/HEAD/docs/method.svg)" in shown
    assert "[scaling](https://example.org/one/two/blob/HEAD/docs/scaling.md)" in shown
    assert re.sub(link, "", shown) == re.sub(link, "", readme)


def test_no_code_of_a_model_is_ever_trusted():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        refused = 0
        for node in ast.walk(ast.parse(text)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if re.fullmatch(r"Auto\w+\.from_pretrained|SentenceTransformer", called):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given["trust_remote_code"] == "False", f"{path}, line {node.lineno}"
                refused += 1
        shown = path.name in ("model_card.py", "mteb.py")  # an example for the reader, and an entry for mteb
        assert text.count("trust_remote_code") == refused + shown, path


@pytest.mark.parametrize("module", ["llm2vec_gen_jax", "llm2vec_gen_jax.commands.__main__"])
def test_a_system_without_file_locks_is_refused_on_import(module):
    hidden = f"import sys; sys.modules['fcntl'] = None; import {module}"  # Windows has no such module
    ended = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True)
    reason = "llm2vec_gen_jax needs Linux or macOS (POSIX file locks): on Windows, run it in WSL"
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1] == f"ImportError: {reason}"
    assert "During handling" not in ended.stderr


# After the dependencies are imported: they were compiled for this system.
MACOS = """
import os, sys
import jax, numpy, transformers
for name in ("copy_file_range", "memfd_create", "posix_fadvise", "posix_fallocate", "sched_getaffinity"):
    delattr(os, name)
os.execv = None
sys.platform = "darwin"

def hide(event, arguments):
    if event == "open" and str(arguments[0]).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(arguments[0])

sys.addaudithook(hide)
import llm2vec_gen_jax.api
from llm2vec_gen_jax.common import huge_pages, locks
sys.orig_argv = ["python", "-m", "launch.encode"]
huge_pages.request()
with locks.locked("output"):
    print(llm2vec_gen_jax.LLM2VecGen.from_pretrained(sys.argv[1]).encode(["one", "two words"]).shape)
"""


def test_what_macos_lacks_is_not_needed(model_folder, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("GLIBC_TUNABLES", None)
    command = [sys.executable, "-c", MACOS, str(model_folder)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "(2, 12)\n"), ended.stderr


# The one script


def run_main(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["llm2vec-gen", *words])
    code = 0
    try:
        launch_main.main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_the_script_lists_every_command(monkeypatch, capsys):
    modules = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__", "__main__"}
    assert launch_main.commands().keys() == modules
    code, shown, _ = run_main(monkeypatch, capsys, "--help")
    assert code == 0 and modules <= {line.split()[0] for line in shown.splitlines()[3:]}
    assert max(map(len, shown.splitlines())) <= 120
    assert run_main(monkeypatch, capsys) == (0, shown, "")
    assert run_main(monkeypatch, capsys, "--version") == (0, f"{llm2vec_gen_jax.__version__}\n", "")


def test_an_unknown_command_is_named_with_the_nearest(monkeypatch, capsys):
    code, shown, errors = run_main(monkeypatch, capsys, "encoed", "x=1")
    assert (code, shown, errors) == (2, "", "error: unknown command 'encoed', did you mean 'encode'?\n")


def test_a_command_of_the_script_is_that_of_the_module(monkeypatch, capsys, command):
    code, shown, _ = run_main(monkeypatch, capsys, "plan", "--help")
    assert code == 0 and shown.startswith("usage: llm2vec-gen plan [CONFIG]")
    assert shown.replace("llm2vec-gen plan", "python -m launch.plan") == command("plan", "--help")[1]


# Shipped configs


def test_a_config_that_is_no_file_is_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = options.load(config.TrainConfig, "configs/qwen3-0.6b.yaml")
    assert shipped == options.load(config.TrainConfig, ROOT / "configs/qwen3-0.6b.yaml")
    assert files.shipped("configs/architectures/qwen3-8b.json") == str(ROOT / "configs/architectures/qwen3-8b.json")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/qwen3-0.6b.yaml").write_text("train: {steps: 7}")
    assert options.load(config.TrainConfig, "configs/qwen3-0.6b.yaml").train.steps == 7  # a user's own comes first
    for path in ("configs/../README.md", "README.md", "configs/none.yaml", "qwen3-0.6b.yaml"):
        assert files.shipped(path) == path
    with pytest.raises(InputError, match="configs/none.yaml: no such config file$"):
        options.load(config.TrainConfig, "configs/none.yaml")


@pytest.mark.parametrize(
    "file, meant",
    [
        ("configs/smollm-135m.yaml", "configs/smollm2-135m.yaml"),
        ("configs/teachers/smollm-135m.yaml", "configs/teachers/smollm2-135m.yaml"),
        ("qwen3-0.6b.yaml", "configs/qwen3-0.6b.yaml"),
        ("configs/lora-r8.yaml", "configs/ablations/lora-r8.yaml"),
    ],
)
def test_a_misspelt_config_is_answered_with_the_shipped_one_of_that_name(file, meant):
    with pytest.raises(InputError, match=f"^{file}: no such config file, did you mean {meant}[?]$"):
        options.load(config.TrainConfig, file)


def test_a_pattern_of_shipped_configs_is_expanded(command):
    code, _, errors = command("ablate", "configs/ablations/tokens-*.yaml", "train.outptu=runs")
    assert code == 2 and "train.outptu" in errors
    code, _, errors = command("ablate", "configs/none-*.yaml")
    assert code == 2 and "configs/none-*.yaml: no such config file" in errors


# The wheel


def tracked(*folders):
    """The files under version control, or None where there is none."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return set(found.stdout.split("\0")) - {""} if found.returncode == 0 else None


@pytest.mark.slow
def test_the_wheel_is_whole_and_runs_where_no_checkout_is(tmp_path, model_folder):
    sources = tmp_path / "sources"
    for name in tracked() or pytest.skip("no git"):  # a build leaves folders behind, and would read those of before
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(sources)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = tracked("llm2vec_gen_jax") | {f"llm2vec_gen_jax/{name}" for name in tracked("configs")}
    assert {name for name in held if ".dist-info/" not in name} == wanted
    licenses = {name.partition(".dist-info/licenses/")[2] for name in held if ".dist-info/licenses/" in name}
    assert licenses == {"LICENSE", "NOTICE", "LICENSES/Apache-2.0.txt"}
    [metadata] = [name for name in held if name.endswith(".dist-info/METADATA")]
    described = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "\n# llm2vec_gen_jax\n" in described and "](docs/" not in described

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    # The dependencies are those of this Python, after the wheel's own files.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    given = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"XLA_FLAGS": ""}

    def run(*words):
        return subprocess.run(words, cwd=elsewhere, env=given, check=True, capture_output=True, text=True).stdout

    script = environment / "bin" / "llm2vec-gen"
    assert run(python, "-c", "import llm2vec_gen_jax; print(llm2vec_gen_jax.__file__)").startswith(str(site))
    assert "  encode " in run(script, "--help")
    assert run(script, "plan", "--help").startswith("usage: llm2vec-gen plan")
    (elsewhere / "texts.txt").write_text("one\ntwo\n")
    run(script, "encode", str(model_folder), "input=texts.txt", "output=vectors", "dtype=float32")
    read = "from llm2vec_gen_jax import load_embeddings; print(load_embeddings('vectors').shape)"
    assert run(python, "-c", read) == "(2, 12)\n"
    compare = (
        "from llm2vec_gen_jax import config; from llm2vec_gen_jax.config import options;"
        "from llm2vec_gen_jax.common import files; from llm2vec_gen_jax.evaluation import instructions;"
        "from llm2vec_gen_jax.pretrained import backbone;"
        "print(options.load(config.TrainConfig, 'configs/qwen3-8b.yaml').backbone.path, len(instructions.read().query),"
        "files.install_command('serve'), *[backbone.resolve_adapter(name).is_dir() for name in backbone.TEACHERS])"
    )
    assert run(python, "-c", compare).split(" ", 1)[0] == "Qwen/Qwen3-8B"
    assert 'pip install "llm2vec-gen-jax[serve]" True True' in run(python, "-c", compare)
