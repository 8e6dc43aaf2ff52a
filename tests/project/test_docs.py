"""README.md and docs/ without running them: every command is read by the real parser, every link and message is real.

A command of ours needs no rule here: its words go through the parser of its own schema.
"""

import argparse
import ast
import importlib.util
import os
import re
import runpy
import shlex
import sys

import pytest

from docs import configuration, figure
from llm2vec_gen_jax import config
from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from tests.commands.test_commands import ACTIONS, COMMANDS, schema_of
from tests.helpers.pages import CANNOT_RUN, CASES, ELSEWHERE, FIRST_PAGE, PAGES, ROOT, blocks, prose, split, stand_in
from tests.project.test_layering import MAY_IMPORT

NAMED = re.compile(rf"({'|'.join(sorted(COMMANDS, key=len, reverse=True))}) (.*=.*)")  # `encode MODEL key=value`
COMMAND = re.compile(r"(python -m launch\.|llm2vec-gen )(.+)", re.S)
NOT_SHELL = {"text", "json", "yaml", "python", "toml"}


@pytest.fixture
def parse(monkeypatch):
    """parse(name, words): the config of a command's words, by the parser and schema of its own module."""
    found = []

    def read(schema, command, positional="CONFIG", argv=None):
        argv = sys.argv[1:] if argv is None else argv
        if not {"-h", "--help"} & set(argv):
            found.append(cli._parse(schema, positional, argv)[1])

    def run(name, words):
        name, *action = name.split()
        monkeypatch.setattr(sys, "argv", [name, *action, *words])
        runpy.run_module(f"launch.{name}", run_name="__main__")
        return found[-1] if found else None

    monkeypatch.setattr(cli, "run", read)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # `plan` prepares it for the TPU compiler
    monkeypatch.chdir(ROOT)
    return run


class Parsed(Exception):
    """A benchmark has read its words."""


def parse_benchmark(monkeypatch, module, words):
    """Reads the words of a benchmark by its own parser."""
    read = argparse.ArgumentParser.parse_known_args

    def parse(self, *arguments, **options):
        _, unknown = read(self, *arguments, **options)
        assert not unknown
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.chdir(ROOT)
    try:
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__")
    except ModuleNotFoundError as error:
        if error.name.startswith("benchmarks"):
            raise
        pytest.skip(f"needs {error.name}")


@pytest.mark.parametrize("line", CASES)
def test_a_command_is_understood(line, parse, monkeypatch):
    name, words = split(shlex.split(line))
    for word in words:
        file = re.fullmatch(r"(?:\w[\w.]*=)?((?:configs|launch|docs|tests)/[^*]*|requirements[\w-]*\.txt)", word)
        assert not file or (ROOT / file[1].split("::")[0]).exists(), f"{word}: there is no such file"
    if name is not None:
        assert name in COMMANDS or words[:1] == ["--help"]
        parse(name, stand_in(words, ROOT))
    elif words[:2] == ["python", "-m"]:
        module, *rest = words[2:]
        if module.startswith("benchmarks.") and module != "benchmarks.compile_time":  # which takes no words
            parse_benchmark(monkeypatch, module, rest)
        assert module == "pytest" or importlib.util.find_spec(module)
    else:
        assert words[0] in ELSEWHERE, f"{words[0]}: say in ELSEWHERE why it is not run"
        if any(word.endswith((".sbatch", "run.sh")) for word in words):
            parse("train", words[next(n for n, word in enumerate(words) if word.endswith(".yaml")) :])


def test_what_cannot_run_is_there():
    """No rule outlives its command."""
    for part in CANNOT_RUN:
        assert any(part in line for line in CASES), part
    used = {split(shlex.split(line))[1][0] for line in CASES if split(shlex.split(line))[0] is None}
    assert set(ELSEWHERE) <= used


@pytest.mark.parametrize(
    "line", ["python -m launch.train train.step=3", "python -m launch.encode MODEL inputs=a", "frobnicate --all"]
)
def test_a_wrong_command_would_be_seen(line, parse, monkeypatch):
    with pytest.raises((InputError, AssertionError)):
        test_a_command_is_understood(line, parse, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_true(page, parse):
    """Blocks say what they hold, links lead somewhere, keys and commands in the text exist."""
    for line, language, _ in blocks(page):
        assert language in NOT_SHELL | {"bash"}, f"{page.name}, line {line}: say what the block holds"
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.M)
            assert anchor in [re.sub(r"[^\w\s-]", "", head).lower().replace(" ", "-") for head in heads], target
    for file in re.findall(r"`((?:[\w-]+/)*\w+\.py)\b[^`]*`", text):
        assert any((folder / file).exists() for folder in (ROOT, ROOT / "llm2vec_gen_jax", ROOT / "docs")), file
    keys = {leaf for name in config.__all__ if name.endswith("Config") for leaf in options._leaves(vars(config)[name])}
    for span in re.findall(r"`([^`\n]+)`", text):
        for key in re.findall(r"(?:^|\s)([a-z_]+\.[a-z_]+)=", span):
            assert key in keys, f"{page.name}: `{span}`"
        if found := NAMED.match(span):
            known = options._leaves(schema_of(found[1]))
            assert all(key in known for key in re.findall(r"(?<=\s)([\w.]+)=", f" {found[2]}")), (
                f"{page.name}: `{span}`"
            )
        found = COMMAND.match(span)
        if found and not found[2].startswith(("NAME", "COMMAND")):
            name, words = split(["python", "-m", *f"launch.{found[2].replace(' ...', '')}".split()])
            parse(name, stand_in(words, ROOT))


def test_the_table_of_commands_is_whole():
    rows = re.findall(r"^\| `(\w+)([^`]*)` \|", PAGES[0].read_text(), flags=re.M)
    assert sorted(name for name, _ in rows) == sorted({name.split()[0] for name in COMMANDS})
    assert {name: set(re.findall(r"\w+", words)) - {"MODEL"} for name, words in rows if name == "convert"} == {
        "convert": set(ACTIONS["convert"])
    }


def test_the_site_has_every_page():
    """The contents of the site name each page once, and its API reference names what exists."""
    listed = [
        re.sub(r".*<(.+)>", r"\1", line)
        for trees in re.findall(r"```\{toctree\}\n(?::.*\n)+\n((?:.+\n)+)```", FIRST_PAGE.read_text())
        for line in trees.splitlines()
    ]
    pages = [path.stem for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".rst") and path != FIRST_PAGE]
    assert sorted(listed) == sorted(pages)
    named = re.findall(r"^\.\. auto\w+:: ([\w.]+)\.(\w+)$", (ROOT / "docs" / "api.rst").read_text(), flags=re.M)
    assert len(named) > 8
    for module, name in named:
        source = ROOT / f"{module.replace('.', '/')}.py"
        defined = [getattr(node, "name", None) for node in ast.parse(source.read_text()).body]
        assert name in defined, f"{module}.{name}"


def test_written_pages_are_up_to_date():
    assert configuration.PAGE.read_text() == configuration.page(), "python -m docs.configuration"
    assert figure.PICTURE.read_text() == figure.picture(), "python -m docs.figure"


def test_configuration_has_every_key_of_every_command():
    text = configuration.PAGE.read_text()
    for name, schema in configuration.commands().items():
        part = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        own = [
            leaf
            for leaf in options._leaves(schema)
            if "." not in leaf and not any(leaf in configuration._names(group) for group in configuration.INHERITED)
        ]
        assert all(f"| `{leaf}` |" in part for leaf in own), name
    assert sorted(configuration.commands()) == COMMANDS


def test_the_table_of_folders_is_that_of_the_layering():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.*)\|$", text, flags=re.M)
    assert [(name, re.findall(r"\w+", allowed)) for name, allowed in rows] == [
        (name, allowed.split()) for name, allowed in MAY_IMPORT.items()
    ]


def test_names_of_the_architecture_page_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    sources = [*(ROOT / "llm2vec_gen_jax").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in sources)))
    names = {part for span in re.findall(r"`([\w.]+)`", text) for part in span.split(".") if part}
    assert not names - words


def messages():
    """Returns the text of every string of our sources, ... for each value in it."""
    found = []
    for folder in ("llm2vec_gen_jax",):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                    found.append("".join(parts))
    return "\n".join(found)


def test_messages_of_troubleshooting_are_those_of_the_code():
    source, told = messages(), (ROOT / "docs" / "troubleshooting.md").read_text()
    found = re.findall(r"^\| `(.+?)` \|", told, flags=re.M)
    assert len(found) > 25
    for message in found:
        message = message.removeprefix("error: ").replace("expected one CONFIG", "expected one ...")
        message = message.replace("as true.", "as ....").replace("the loss is nan", "the loss is ...")
        for part in message.split("..."):
            assert part.strip(" .,:") in source, f"no message says {part!r}"
