"""The import direction of the package, and the names that must appear nowhere in it."""

import ast
import pathlib
import subprocess
import sys

import pytest

import llm2vec_gen_jax

ROOT = pathlib.Path(llm2vec_gen_jax.__file__).parent
PACKAGE = ROOT.name
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in (ROOT, ROOT / "config", ROOT / "formats", ROOT / "lens", ROOT / "study")
    for path in folder.glob("*.py")
    if path.name != "__init__.py"
} | {"config": ROOT / "config" / "__init__.py"}
LAUNCH = {f"launch.{path.stem}": path for path in (ROOT.parent / "launch").glob("*.py")}
# A module imports only from floors below its own.
FLOORS = (
    "batcher collectives config.common costs devices errors preemption programs rendezvous study.tables targets "
    "telemetry templates",
    "locks",
    "architecture config.inference config.lens config.serve config.training execution files layers openai_api "
    "progress sharding supervised topologies",
    "config.study kernels package_index quantization study.plots tracking",
    "config",
    "attention options",
    "corpus data distributed download instructions metrics tasks tokenizer vectors",
    "study.splits",
    "backbone card checkpoint heads lens.chart memory optim",
    "formats.gguf_file formats.torchzip formats.weights lora",
    "formats.gguf formats.hf formats.peft formats.published",
    "loading model",
    "directory encode losses trainer",
    "generate lens.states ridge teacher unsupervised",
    "export study.decoded lens.latent lens.logit respond train",
    "ablate api lens.generations lens.search plan synthesize",
    "bulk embedders engine train_teacher verify",
    "harness lens.report quickstart serve study.readings",
    "evaluate",
    "study.stages",
)
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor.split()}
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


def test_every_module_has_a_floor():
    missing = FILES.keys() - FLOOR_OF
    assert not missing, f"say in FLOORS what {sorted(missing)} may import"


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_down_only(module):
    upward = {other for other in own_imports(module) if FLOOR_OF[other] >= FLOOR_OF[module]}
    assert not upward, f"{module} is not above {sorted(upward)}"


def test_imports_are_found():
    """The table says something: the lowest and the highest module meet, and the seams are there."""
    assert {"errors", "layers", "losses", "formats.torchzip"} <= reached("quickstart")
    assert own_imports("attention") == {"kernels", "layers"}
    assert own_imports("formats.weights") == {"backbone", "errors", "quantization", "sharding"}
    below = "architecture attention backbone errors execution heads kernels layers lora quantization sharding"
    assert reached("model") == {"model", *below.split()}


@pytest.mark.parametrize("module", sorted(module for module in FILES if module.startswith("formats.")))
def test_formats_know_nothing_of_the_method(module):
    assert not reached(module) & {"api", "encode", "generate", "heads", "losses", "model", "teacher", "train"}


def test_the_library_imports_none_of_its_users():
    for module, path in FILES.items():
        for name in imported(path.read_text()):
            assert not under(name, ("launch", "tests", "benchmarks")), f"{module} imports {name}"


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


@pytest.mark.parametrize("module", sorted(FILES | LAUNCH))
def test_no_torch_no_outdated_jax_nothing_that_executes_data(module):
    for name in used((FILES | LAUNCH)[module].read_text()):
        assert not under(name, ("torch", *OUTDATED, *EXECUTES_DATA)), f"{module} uses {name}"


def test_nothing_is_unpickled():
    names = {module: used(path.read_text()) for module, path in FILES.items()}
    assert [module for module in names if "pickle" in names[module]] == ["formats.torchzip"]
    allowed = {"pickle", "pickle.UnpicklingError", "pickle.dumps"}
    assert {name for name in names["formats.torchzip"] if under(name, ["pickle"])} == allowed


# Linen's own method; harness._Folder says what `build` gives; the module's docstring is the command of a `main`.
DESCRIBED_ELSEWHERE = {("", "setup"), ("harness", "build"), *((module, "main") for module in LAUNCH)}


@pytest.mark.parametrize("module", sorted(FILES | LAUNCH))
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


def test_importing_the_package_starts_neither_jax_nor_torch():
    code = f"import sys, {PACKAGE}; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT.parent, text=True).split()
    assert PACKAGE in modules
    assert not {"jax", "torch", "transformers", "flax"} & set(modules)
