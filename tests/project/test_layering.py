"""The import direction of the package, and the names that must appear nowhere in it."""

import ast
import pathlib
import subprocess
import sys

import pytest

import llm2vec_gen_jax
from tests.helpers.processes import environment

ROOT = pathlib.Path(llm2vec_gen_jax.__file__).parent
PACKAGE = ROOT.name
ELSEWHERE = ("pytorch_encode.py", "llm2vec_gen_module.py")  # files for other environments
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if path != ROOT / "__init__.py" and path.name not in ELSEWHERE
}
LAUNCH = {f"launch.{path.stem}": path for path in (ROOT.parent / "launch").glob("*.py")}
# What each folder (and api.py) may import, beside itself; from the bottom to the top.
MAY_IMPORT = {
    "common": "",
    "config": "common",
    "parallel": "common",
    "model": "common parallel",
    "data": "common",
    "formats": "common parallel model",
    "pretrained": "common config parallel model formats",
    "inference": "common config parallel model data pretrained",
    "teachers": "common config parallel model data formats pretrained inference",
    "lens": "common config parallel model data pretrained inference teachers",
    "api": "common config parallel model formats pretrained inference teachers lens",
    "evaluation": "common config parallel data pretrained api teachers",
    "training": "common config parallel model data formats pretrained inference teachers api evaluation",
    "planning": "common config parallel model pretrained inference training",
    "serving": "common config parallel data pretrained inference api",
    "integrations": "common config parallel data pretrained inference api",
    "experiments": "common config parallel model data pretrained inference teachers api training evaluation",
    "commands": (
        "common config parallel data pretrained inference lens api training planning evaluation serving integrations"
        " experiments"
    ),
}
OUTDATED = (
    "flax.nnx",
    "jax.experimental.host_callback",
    "jax.experimental.maps",
    "jax.experimental.pjit",
    "jax.experimental.shard_map",
    "jax.random.PRNGKey",
    "jax.tree_leaves",
    "jax.tree_map",
    "jax.tree_multimap",
)
EXECUTES_DATA = ("cloudpickle", "dill", "eval", "exec", "joblib", "marshal", "pickle.load", "pickle.loads")


def imported(source):
    """Returns the dotted names that a source text imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def used(source):
    """Returns every dotted name of a source text, imported or read, with import aliases resolved."""
    tree, aliases = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        if isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def dotted(node):
        if isinstance(node, ast.Name):
            return aliases.get(node.id, node.id)
        inner = dotted(node.value) if isinstance(node, ast.Attribute) else None
        return inner and f"{inner}.{node.attr}"

    read = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)}
    return imported(source) | (read - {None})


def under(name, prefixes):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def own_imports(module):
    """Returns the modules of the package that a module of it imports."""
    found = set()
    for name in imported(FILES[module].read_text()):
        if under(name, [PACKAGE]):
            inside = name.removeprefix(PACKAGE).removeprefix(".")
            found |= set(sorted((other for other in FILES if under(inside, [other])), key=len)[-1:])
    return found


def reached(module):
    """Returns all modules of the package that importing a module can lead to."""
    found, waiting = set(), {module}
    while waiting:
        found |= waiting
        waiting = set().union(*map(own_imports, waiting)) - found
    return found


def folder(module):
    return module.partition(".")[0]


def test_the_package_is_its_folders():
    """The folder list is the architecture: each says in one sentence what it is for."""
    assert {folder(module) for module in FILES} == MAY_IMPORT.keys()
    for name in MAY_IMPORT.keys() - {"api"}:
        about = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text())) or ""
        assert about.splitlines()[0].endswith("."), f"{name}: what is it for, in a sentence?"
    entries = [path.name for path in ROOT.iterdir() if path.name not in ("__pycache__", "configs")]
    assert len(entries) <= 20, sorted(entries)


def test_the_table_has_no_cycle():
    order = list(MAY_IMPORT)
    for number, (name, allowed) in enumerate(MAY_IMPORT.items()):
        assert set(allowed.split()) <= set(order[:number]), name


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_imports_what_its_folder_may(module):
    allowed = {folder(module), *MAY_IMPORT[folder(module)].split()}
    others = {other for other in own_imports(module) if folder(other) not in allowed}
    assert not others, f"{module} imports {sorted(others)}"


@pytest.mark.parametrize("module", ["training.losses", *sorted(m for m in FILES if folder(m) == "model")])
def test_the_method_knows_neither_processes_nor_files_nor_settings(module):
    outside = {other for other in reached(module) if folder(other) in ("common", "config", "parallel")}
    assert outside <= {"common", "common.errors", "parallel", "parallel.sharding"}


def test_imports_are_found():
    """The table says something: the lowest and the highest module meet, and the seams are there."""
    assert {"common.errors", "model.layers", "training.losses", "formats.torchzip"} <= reached("experiments.quickstart")
    assert own_imports("model.attention") == {"model.execution", "model.fused_attention", "model.layers"}
    below = "architecture attention backbone compressor execution fused_attention layers lora quantization"
    expected = {"model.llm2vec_gen", "common.errors", "parallel.sharding", *(f"model.{name}" for name in below.split())}
    assert reached("model.llm2vec_gen") == expected


def test_the_library_imports_none_of_its_users():
    for module, path in FILES.items():
        for name in imported(path.read_text()):
            assert not under(name, ("launch", "tests", "benchmarks")), f"{module} imports {name}"


def test_the_library_logs_and_only_commands_print():
    """Loggers have the names of the modules; commands show them, see commands/cli.py."""
    commands = ("commands", "experiments", "planning", "serving.server")  # their output
    before_the_exit = ("parallel.watchdog",)
    on_standard_error = ("common.progress", "parallel.devices", "pretrained.default_backbone")
    for module, path in FILES.items():
        if not under(module, commands + before_the_exit + on_standard_error):
            tree = ast.parse(path.read_text())
            printed = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "print"]
            assert not printed, f"{module} prints in line {printed[0]}: log it"
            assert "logging.getLogger(" not in path.read_text() or "getLogger(__name__)" in path.read_text()


def test_names_are_resolved():
    """The three tests below would see these spellings."""
    source = """
import jax.random as jr
from jax.experimental.pjit import pjit
from pickle import loads as read
def f():
    import torch.nn
    import jax
    jax.tree_map(jr.PRNGKey(0).x, read)
"""
    expected = {"jax.tree_map", "jax.random.PRNGKey", "jax.experimental.pjit.pjit", "pickle.loads"}
    assert expected | {"torch.nn"} <= used(source)


@pytest.mark.parametrize("module", sorted((FILES | LAUNCH).keys() - {"integrations.sentence_transformers"}))
def test_no_torch_no_outdated_jax_nothing_that_executes_data(module):
    for name in used((FILES | LAUNCH)[module].read_text()):
        assert not under(name, ("torch", *OUTDATED, *EXECUTES_DATA)), f"{module} uses {name}"


def test_nothing_is_unpickled():
    names = {module: used(path.read_text()) for module, path in FILES.items()}
    assert [module for module in names if "pickle" in names[module]] == ["formats.torchzip"]
    allowed = {"pickle", "pickle.UnpicklingError", "pickle.dumps"}
    assert {name for name in names["formats.torchzip"] if under(name, ["pickle"])} == allowed


# Linen's own method; mteb._Folder says what `build` gives; the module's docstring is the command of a `main`.
DESCRIBED_ELSEWHERE = {
    ("", "setup"),
    ("evaluation.mteb", "build"),
    *((module, "main") for module in FILES if folder(module) == "commands"),
}


@pytest.mark.parametrize("module", sorted(module for module in FILES | LAUNCH if folder(module) != "integrations"))
def test_everything_public_says_what_it_does(module):
    tree = ast.parse((FILES | LAUNCH)[module].read_text())
    assert ast.get_docstring(tree), f"{module}: what is it for?"

    def undescribed(node):
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and inner.name[0] != "_":
                elsewhere = {("", inner.name), (module, inner.name)} & DESCRIBED_ELSEWHERE
                elsewhere |= {ast.unparse(way) for way in inner.decorator_list} & {"overload"}
                if not (ast.get_docstring(inner) or elsewhere):
                    yield inner.name
                if isinstance(inner, ast.ClassDef):
                    yield from (f"{inner.name}.{name}" for name in undescribed(inner))

    assert not list(undescribed(tree)), f"{module}: a docstring with shapes, units and errors is missing"


def imported_by(code):
    """Returns the modules of a new process after some imports."""
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    return set(subprocess.check_output(command, cwd=ROOT.parent, text=True).split())


def test_importing_the_package_starts_neither_jax_nor_torch():
    modules = imported_by(f"import {PACKAGE}")
    assert PACKAGE in modules
    assert not {"jax", "torch", "transformers", "flax"} & modules


def test_importing_the_embedder_imports_nothing_that_only_training_needs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    modules = imported_by(f"from {PACKAGE} import LLM2VecGen")
    assert {"jax", f"{PACKAGE}.api"} <= modules
    assert not {"grain", "orbax", "optax", "datasets"} & modules
