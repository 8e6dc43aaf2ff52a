"""README.md and docs/ as the tests read them: their blocks, their prose and the commands that they hold.

Shell is what is indented by four spaces or fenced as bash; Python is fenced as python. What cannot be run is in
CANNOT_RUN or ELSEWHERE with the reason; a new program that is in neither fails.
"""

import pathlib
import re
import shlex

from tests.commands.test_commands import ACTIONS

ROOT = pathlib.Path(__file__).parents[2]
FIRST_PAGE = ROOT / "docs" / "index.md"  # of the site: README.md and the contents, in Sphinx's directives
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - {FIRST_PAGE})]
OPTIONAL = re.compile(r"(?<=\s)\[(?:--\w|\w+=)[^\]]*\](?=\s|$)")  # [key=value ...], [--preset cpu|gpu]

# Programs whose commands are not run here, and why.
ELSEWHERE = {
    "pip": "changes the environment; the files that it names are checked",
    "docker": "builds an image",
    "vllm": "serves an LLM on a GPU; test_openai_engine.py has a server of its API",
    "kubectl": "needs a Kubernetes cluster",
    "sbatch": "needs Slurm; the words of the command that it starts are parsed",
    "sky": "rents machines",
    "launch/tpu_vm/run.sh": "needs Cloud TPU VMs; the words of the command that it starts are parsed",
    "ruff": "checks style; so does the continuous integration",
    "sphinx-build": "builds the site of these pages; so does the continuous integration",
    "cat": "feeds the next command, which is given the file as its standard input",
    "curl": "asks a server: the page of the server runs as a whole",
}
# Commands of ours that cannot run here, by what they hold, and why. Their words are parsed all the same.
CANNOT_RUN = {
    "engine=openai": "needs a server of that API; test_openai_engine.py has one",
    "tasks=mteb-lite": "downloads from the hub",
    "revision=": "downloads from the hub; test_hub_keys.py has a cache of it",
    "local_files_only=": "needs a cache of the hub; test_hub_keys.py has one",
    "python -m tests.parity.peer": "installs PyTorch from a package index; test_parity.py does it where it can",
    "python -m pytest": "is this run",
    "python -m benchmarks.": "measures for minutes; test_benchmarks, test_serve_process and test_chaos run them small",
    "python=PYTORCH_ENV": "needs that environment; tests/parity/test_convert.py runs it",
    "output=vectors shard.index=1": "the other share of the command before it",
    "serve MODEL": "the page of the server runs as a whole",
    "budget=full": "the same command as the others, on sizes that nobody waits for",
    "train.init_from=": "goes on from the run of the command before it",
    "process_id=$i": "runs as a whole in test_docs_run.py",
}
# What stands for something else where a command runs.
STANDS_FOR = {"CONFIG": "configs/smollm2-135m.yaml", "PUBLISHED_MODEL": "MODEL", "smollm2-135m": "tiny"}
REST = ["data.responses=responses.jsonl", "train.output=runs/more"]  # what ... stands for, after `train CONFIG`


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
