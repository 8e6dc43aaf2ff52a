"""Dockerfiles, workflows and hooks: what they name exists, and they run what the project runs."""

import json
import pathlib
import re

import pytest
import yaml

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import ServeConfig

ROOT = pathlib.Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "launch" / "docker").glob("*.Dockerfile"))
COPIED_FROM = re.compile(r"^COPY (.+) \S+$|--mount=type=bind,source=(\S+),", re.M)


def ignored():
    """The lines of .dockerignore without comments."""
    return [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_does_not_run_as_root_and_copies_what_is_there(path):
    text = path.read_text()
    assert text.startswith(f"# docker build -f launch/docker/{path.name} ")
    [user] = re.findall(r"^USER (\S+)$", text.split("\nFROM ")[-1], flags=re.M)
    assert int(user) > 0  # a number: Kubernetes cannot check names with runAsNonRoot
    for names in COPIED_FROM.findall(text):
        for name in " ".join(names).split():
            assert (ROOT / name).exists() and name.split("/")[0] not in ignored(), name


def test_images_hold_no_leftovers():
    """The context of a build is the checkout without what .gitignore names."""
    leftovers = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    assert leftovers - {line.removeprefix("**/") for line in ignored()} == set()
    needed = {"llm2vec_gen_jax", "launch", "configs", "pyproject.toml", "setup.py", "README.md", "NOTICE", "LICENSES"}
    assert not needed & set(ignored())


def test_the_command_of_the_serving_image_is_understood():
    text = (ROOT / "launch" / "docker" / "serve.Dockerfile").read_text()
    (script, command, *words), default = (
        json.loads(re.search(rf"^{key} (\[.+\])$", text, flags=re.M)[1]) for key in ("ENTRYPOINT", "CMD")
    )
    assert (script, command) == ("llm2vec-gen", "serve")
    for more in (default, ["/model", "normalize=true"]):
        (model, config), _ = cli._parse(ServeConfig, "MODEL", [*words, *more])
        assert (model, config.host, config.port) == (more[0], "0.0.0.0", 8000)
    assert "EXPOSE 8000\n" in text and "http://127.0.0.1:8000/health" in text


def test_workflows_and_hooks_run_the_checks_of_the_project():
    script = (ROOT / ".ci" / "run").read_text()
    runs = {}
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        runs[path.stem] = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert runs.keys() == {"ci", "slow"}
    assert runs["ci"][0] == runs["slow"][0] == "bash .ci/run"
    assert all((ROOT / name).exists() for name in re.findall(r"-r (\S+)", " ".join(runs["ci"])))
    slow = runs["slow"][-1].removeprefix(".venv-ci/bin/")
    assert f"`{slow}`" in (ROOT / "README.md").read_text() and " -m slow" in slow
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["entry"] for hook in hooks} == {"ruff check", "ruff format --check", "mypy"}
    assert all(hook["entry"].split(" --")[0] in script for hook in hooks)
