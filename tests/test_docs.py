"""README.md and docs/: every command is read by the real parser, every example is run, every link and message is real.

Shell is what is indented by four spaces or fenced as bash; Python is fenced as python. A command of ours needs no rule
here: its words go through the parser of its own schema, and then it runs as it stands, in a folder where MODEL, DIR,
queries.jsonl and the like exist, with the words of SMALL behind it that make it small. What cannot be run is in
CANNOT_RUN or ELSEWHERE with the reason; a new program that is in neither fails.
"""

import argparse
import ast
import gzip
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys

import jax
import pytest

from docs import configuration, figure
from launch import start
from llm2vec_gen_jax import LLM2VecGen, config, options
from llm2vec_gen_jax.errors import InputError

from .conftest import write_jsonl
from .tasks import TYPES, write_task
from .test_commands import ACTIONS, COMMANDS, schema_of

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMED = re.compile(rf"({'|'.join(sorted(COMMANDS, key=len, reverse=True))}) (.*=.*)")  # `encode MODEL key=value`
COMMAND = re.compile(r"(python -m launch\.|llm2vec-gen )(.+)", re.S)
OPTIONAL = re.compile(r"(?<=\s)\[(?:--\w|\w+=)[^\]]*\](?=\s|$)")  # [key=value ...], [--preset cpu|gpu]
NOT_SHELL = {"text", "json", "yaml", "python", "toml"}

# Programs whose commands are not run here, and why.
ELSEWHERE = {
    "pip": "changes the environment; the files that it names are checked",
    "docker": "builds an image",
    "kubectl": "needs a Kubernetes cluster",
    "sbatch": "needs Slurm; the words of the command that it starts are parsed",
    "sky": "rents machines",
    "launch/tpu_vm/run.sh": "needs Cloud TPU VMs; the words of the command that it starts are parsed",
    "ruff": "checks style; so does the continuous integration",
    "cat": "feeds the next command, which is given the file as its standard input",
    "curl": "asks a server: the page of the server runs as a whole",
}
# Commands of ours that cannot run here, by what they hold, and why. Their words are parsed all the same.
CANNOT_RUN = {
    "tasks=mteb-lite": "downloads from the hub",
    "python -m tests.peer": "installs PyTorch from a package index; test_parity.py does it where it can",
    "python -m pytest": "is this run",
    "python -m benchmarks.": "measures for minutes; test_benchmarks.py, test_serve.py and test_chaos.py run them small",
    "python=PYTORCH_ENV": "needs that environment; tests/test_convert.py runs it",
    "output=vectors shard.index=1": "the other share of the command before it",
    "serve MODEL": "the page of the server runs as a whole",
    "budget=full": "the same command as the others, on sizes that nobody waits for",
    "process_id=$i": "runs as a whole, below",
}
# What stands for something else where a command runs.
STANDS_FOR = {"CONFIG": "configs/smollm2-135m.yaml", "PUBLISHED_MODEL": "MODEL", "smollm2-135m": "tiny"}
REST = ["data.responses=responses.jsonl", "train.output=runs/more"]  # what ... stands for, after `train CONFIG`
TRAIN = ["backbone.path=tiny", "backbone.dtype=float32", "train.steps=2", "train.batch_size=8", "train.remat=none"]
TRAIN += ["compression.num_tokens=3", "data.max_query_length=40", "data.max_answer_length=24", "kernels.attention=xla"]
STUDY = {"queries": 8, "held_out": 3, "max_new_tokens": 12, "steps": 2, "schedule_steps": 3, "ablation_steps": 2}
STUDY |= {"batch_size": 8, "seeds": 1, "limit": 4, "hyde_limit": 2, "hyde_tokens": 4, "decoded_tokens": 4, "timed": 2}
# What is added to each command, by its name, to make it small.
SMALL = {
    "quickstart": ["backbone.path=talker", "queries=16", "steps=2", "max_new_tokens=8"],
    "synthesize": ["backbone.path=talker", "count=3", "batch_size=4", "max_new_tokens=24"],
    "respond": ["backbone.path=tiny", "limit=4", "batch_size=2", "max_new_tokens=4"],
    "train": TRAIN,
    "ablate": [*TRAIN, "teacher.adapters="],
    "train_teacher": [
        *("backbone.path=tiny", "mntp.steps=2", "mntp.batch_size=8", "mntp.max_length=16", "mntp.rank=2"),
        *("simcse.steps=2", "simcse.batch_size=8", "simcse.rank=2", "simcse.max_length=16"),
    ],
    "encode": ["batch_size=2", "max_length=40"],
    "decode": ["max_new_tokens=4"],
    "lens logit": ["max_length=40"],
    "lens build_index": ["contexts=50", "max_length=24", "batch_size=4", "layers="],
    "lens query": ["max_length=40", "layers="],
    "lens generations": ["limit=3", "max_new_tokens=4", "max_length=40"],
    "lens report": ["limit=3", "max_new_tokens=4", "max_length=40"],
    "convert verify": ["max_new_tokens=2"],
    "evaluate": ["limit=4", "max_new_tokens=4", "batch_size=8", "dtype=float32"],
    "reproduce": ["backbone.path=tiny", "teacher.adapters=", *(f"sizes.{key}={n}" for key, n in STUDY.items())],
    "plan": [  # for processors: the compiler for TPUs is no requirement, and test_tpu.py has it
        *("architecture=tiny/config.json", "topology=cpu:8", "mesh.data=4", "mesh.fsdp=2", "train.batch_size=8"),
        *("query_length=16", "answer_length=16", "search=false"),
    ],
}
OUTPUTS = ("output", "train.output", "merged", "backbone_output")
FAST = ("decode", "encode", "lens logit", "convert from_pytorch", "respond")  # a second or two each; others are slow


def blocks(page):
    """Yields (line, language, text) of every block of a page; what is indented is bash."""
    lines, number = page.read_text().splitlines(), 0
    while number < len(lines):
        if lines[number].startswith("```"):
            end = lines.index("```", number + 1)
            yield number + 1, lines[number][3:], "\n".join(lines[number + 1 : end])
        elif lines[number].startswith("    ") and not lines[number - 1].strip():
            end = number
            while end + 1 < len(lines) and (lines[end + 1].startswith("    ") or not lines[end + 1].strip()):
                end += 1
            yield number + 1, "bash", "\n".join(line[4:] for line in lines[number : end + 1])
        else:
            end = number
        number = end + 1


def prose(page):
    """Returns the text of a page without its blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    return re.sub(r"(?<=\n\n)(    .*\n|\n)+", "", text)


def commands(text):
    """Returns the simple commands of a shell text, each a list of words without assignments before it."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(OPTIONAL.sub("", line), posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                found.append(words)
                words = []
            elif words or not re.fullmatch(r"[A-Z_0-9]+=.*|do", word):
                words.append(word)
    return [words for words in found if words and words[0] not in ("for", "done", "wait")]


def cases():
    """Returns {command line: where it stands} of all pages, each once."""
    found = {}
    for page in PAGES:
        for line, language, text in blocks(page):
            for words in commands(text) if language == "bash" else []:
                found.setdefault(shlex.join(words), f"{page.relative_to(ROOT)}, line {line}")
    return found


CASES = cases()


def split(words):
    """Returns (name, words) of a command of ours: ("lens logit", ["MODEL", ...]); (None, words) of another."""
    if words[0] == "llm2vec-gen":
        words = ["python", "-m", f"launch.{words[1]}", *words[2:]]
    if words[:2] != ["python", "-m"] or not words[2].startswith("launch."):
        return None, words
    name, rest = words[2].removeprefix("launch."), words[3:]
    if name in ACTIONS and rest[0] not in ("-h", "--help"):
        name, rest = f"{name} {rest[0]}", rest[1:]
    return name, rest


def stand_in(words, folder):
    """Returns the words with what stands for something else replaced, and patterns of configs expanded in a folder."""
    found = []
    for word in words:
        if word == "...":
            found += REST
        elif word.endswith("*.yaml"):
            found += sorted(map(str, folder.glob(word)))
        else:
            found.append(STANDS_FOR.get(word, word).replace("$i", "0"))
    return found


@pytest.fixture
def parse(monkeypatch):
    """parse(name, words): the config of a command's words, by the parser and schema of its own module."""
    found = []

    def read(schema, command, positional="CONFIG", words=None):
        words = sys.argv[1:] if words is None else words
        if not {"-h", "--help"} & set(words):
            found.append(start._read(schema, positional, words)[1])

    def run(name, words):
        name, *action = name.split()
        monkeypatch.setattr(sys, "argv", [name, *action, *words])
        runpy.run_module(f"launch.{name}", run_name="__main__")
        return found[-1] if found else None

    monkeypatch.setattr(start, "run", read)
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
            if "." not in leaf and leaf not in configuration._names(config.DistributedConfig)
        ]
        assert all(f"| `{leaf}` |" in part for leaf in own), name
    assert sorted(configuration.commands()) == COMMANDS


def messages():
    """Returns the text of every string of our sources, ... for each value in it."""
    found = []
    for folder in ("llm2vec_gen_jax", "launch"):
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
        message = message.replace("for true.", "for ....").replace("the loss is nan", "the loss is ...")
        for part in message.split("..."):
            assert part.strip(" .,:") in source, f"no message says {part!r}"


# Running them


@pytest.fixture(scope="module")
def world(tiny_folder, model_folder, talker_folder, tmp_path_factory):  # noqa: F811
    """A folder in which the commands of the pages find what they name."""
    folder = tmp_path_factory.mktemp("world")
    for name, target in {"configs": ROOT / "configs", "tiny": tiny_folder("qwen3"), "talker": talker_folder}.items():
        (folder / name).symlink_to(target)
    for name in ("MODEL", "model-pt", "runs/quickstart/run/model", "runs/demo/model"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(model_folder, folder / name)
    questions = [f"How many {word} are {number}?" for number, word in enumerate("cats dogs rivers teas".split() * 5)]
    rows = [{"id": n, "question": text, "answer": f"About {n * n}, they say."} for n, text in enumerate(questions)]
    write_jsonl(folder / "responses.jsonl", rows)
    write_jsonl(folder / "queries.jsonl", [{"id": row["id"], "question": row["question"]} for row in rows])
    (folder / "queries.jsonl.gz").write_bytes(gzip.compress((folder / "queries.jsonl").read_bytes()))
    (folder / "texts.txt").write_text("\n".join(questions) + "\n")
    (folder / "questions.txt").write_text("\n".join(questions[:3]) + "\n")
    write_jsonl(folder / "texts.jsonl", [{"id": row["id"], "text": row["question"]} for row in rows])
    for name in ("corpus", "notes"):
        (folder / name).mkdir()
    shutil.copy(folder / "texts.jsonl", folder / "corpus" / "a.jsonl")
    (folder / "corpus" / "b.jsonl.gz").write_bytes(gzip.compress((folder / "texts.jsonl").read_bytes()))
    for number, text in enumerate(questions[:5]):
        (folder / "notes" / f"{number}.txt").write_text(text)
    for kind in TYPES:
        write_task(folder / "DIR" / kind, kind)
    write_task(folder / "DIR" / "dev", "sts", "SmallDev")
    for name in ("queries", "corpus"):  # texts that are in no other task
        file = folder / "DIR" / "safety_retrieval" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        write_jsonl(file, [row | {"text": f"forbidden {row['text'].strip()}"} for row in rows])
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world, for one command."""
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    monkeypatch.setenv("LLM2VEC_GEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "world"


def made_by_others(words):
    """Yields the commands that make what a command reads and the world does not hold."""
    if any("soft_prompts=vectors" in word for word in words):
        yield "encode", ["MODEL", "input=texts.jsonl", "output=vectors", "save_soft_prompts=true"]
    if "index=index" in words:
        yield "lens build_index", ["MODEL", "input=corpus/*.jsonl", "output=index"]
    if any("runs/teacher/mntp" in word for word in words):
        yield "train_teacher", ["corpus.path=texts.txt", "train.output=runs/teacher"]


def runnable():
    """Yields the commands of ours that run here, slow ones marked."""
    for line, place in CASES.items():
        name, words = split(shlex.split(line))
        if name is None or "--help" in words or any(part in line for part in CANNOT_RUN):
            continue
        slow = name not in FAST or list(made_by_others(words))
        yield pytest.param(name, words, id=f"{place}: {line}", marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("name, words", list(runnable()))
def test_a_command_runs(name, words, here, command, monkeypatch):
    if name in ("evaluate", "reproduce"):
        pytest.importorskip("mteb", reason="needs requirements-eval.txt")
    monkeypatch.chdir(here)
    more = SMALL.get(name, [])
    if name == "train" and not any(word.startswith("teacher.adapters=runs/") for word in words):
        more = [*more, "teacher.adapters="]  # those of the configs are of other backbones
    for other, its in made_by_others(words):
        code, _, errors = command(other, *its, *SMALL.get(other, []))
        assert code == 0, errors
    given = stand_in(words, here)
    for word in given:  # the world holds a file of this name for the commands that read it
        key, _, value = word.partition("=")
        if key in OUTPUTS and (here / value).exists():
            shutil.rmtree(value) if (here / value).is_dir() else (here / value).unlink()
    if name == "quickstart":  # its output's default
        shutil.rmtree("runs/quickstart")
    before = {path for path in here.rglob("*")}
    if "input=-" in given:
        monkeypatch.setattr(sys, "stdin", open(here / "texts.txt", encoding="utf-8"))
    code, out, errors = command(name, *given, *more)
    assert code == 0, errors
    assert out and (set(here.rglob("*")) - before or not any(word.partition("=")[0] in OUTPUTS for word in given))


PYTHON = [
    pytest.param(text, id=f"{page.name}, line {line}")
    for page in PAGES
    for line, language, text in blocks(page)
    if language == "python"
]
NEEDS = {"openai": "runs with the page of the server", "get_tasks": "downloads from the hub"}
LIBRARIES = ("sentence_transformers", "langchain_core", "llama_index")  # of requirements-integrations.txt


@pytest.mark.parametrize("text", PYTHON)
def test_python_runs(text, here, command, monkeypatch):
    """Each example runs by itself; `model` and `texts` are there, and the vectors that a command before it writes."""
    tree = ast.parse(text)
    for part, reason in NEEDS.items():
        if part in text:
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("llm2vec_gen_jax"):
                    module = pytest.importorskip(node.module) if node.module.endswith("harness") else None
                    assert module is None or all(hasattr(module, alias.name) for alias in node.names)
            pytest.skip(reason)
    for library in LIBRARIES:
        if f"import {library}" in text or f"from {library}" in text:
            pytest.importorskip(library)
    monkeypatch.chdir(here)
    if "load_embeddings" in text:
        assert command("encode", "MODEL", "input=texts.txt", "output=vectors", *SMALL["encode"])[0] == 0
    if "model-pt" in text:
        shutil.rmtree("model-pt")
    names = {"texts": ["one text", "another"]}
    if "model." in text and "from_pretrained" not in text:
        names["model"] = LLM2VecGen.from_pretrained("MODEL")
    exec(compile(tree, "example", "exec"), names)  # noqa: S102


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment():
    """Of processes on one device, whose `python` is this one."""
    folder = pathlib.Path(sys.executable).parent
    return os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/clusters.md"])
def test_two_processes_run(page, here):
    [text] = [text for _, language, text in blocks(ROOT / page) if language == "bash" and "process_id=$i" in text]
    small = " ".join([*TRAIN, "teacher.adapters="])
    text = text.replace("process_id=$i", f"process_id=$i {small}").replace("9876", str(free_port()))
    done = subprocess.run(["bash", "-c", text], cwd=here, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and (here / "runs/two/model/run_config.yml").is_file(), done.stderr
    assert done.stdout.count("model: runs/two/model") == 2


@pytest.mark.slow
def test_the_page_of_the_server_runs(here):
    """One server, and every request of the page to it; vectors of the tiny model have 12 numbers."""
    pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
    pytest.importorskip("openai", reason="needs requirements-serve.txt")
    port = free_port()
    shell = [text for _, language, text in blocks(ROOT / "docs/serving.md") if language == "bash"]
    [plain] = [words for text in shell for words in commands(text) if words[-2:] == ["launch.serve", "MODEL"]]
    server = subprocess.Popen(
        [*plain, f"port={port}", "max_length=40", "batch_size=2"],
        cwd=here,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert any(line.startswith("ready: ") for line in server.stdout)
        asked = 0
        for line in [line for text in shell for line in text.splitlines() if line.startswith("curl")]:
            line = line.replace("8000", str(port)).replace('"dimensions": 128', '"dimensions": 8')
            done = subprocess.run(["bash", "-c", f"{line} -s"], capture_output=True, text=True)
            assert done.returncode == 0 and "error" not in json.loads(done.stdout), (line, done.stdout)
            asked += 1
        assert asked >= 3
        for _, language, text in blocks(ROOT / "docs/serving.md"):
            if language == "python":
                names = {}
                exec(compile(text.replace("8000", str(port)), "example", "exec"), names)  # noqa: S102
                assert len(names["vectors"]) == 2 and len(names["vectors"][0]) == 12
    finally:
        server.terminate()
        assert server.wait(60) == 0
