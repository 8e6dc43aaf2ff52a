import os
import subprocess
import sys

import pytest

from llm2vec_gen_jax.common import huge_pages

TUNABLE = "glibc.malloc.hugetlb"


@pytest.mark.parametrize("before", [None, "glibc.malloc.arena_max=2", f"{TUNABLE}=0"])
def test_a_command_starts_again_once_with_huge_pages(tmp_path, before):
    (tmp_path / "sitecustomize.py").write_text("import os; print(os.environ.get('GLIBC_TUNABLES'))")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"} | ({"GLIBC_TUNABLES": before} if before else {})
    command = [sys.executable, "-u", "-m", "launch", "--version"]
    *starts, version = subprocess.run(command, env=environment, text=True, capture_output=True).stdout.split()
    assert version == "0.1.0"
    expected = [str(before)]
    if huge_pages._are_offered() and TUNABLE not in str(before):
        expected.append(f"{before}:{TUNABLE}=1" if before else f"{TUNABLE}=1")
    assert starts == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["python", "-m", "launch.train", "config.yaml"], True),
        (["python", "-u", "-m", "launch"], True),
        (["python", "-m", "llm2vec_gen_jax.commands", "train"], True),
        (["python", "/usr/bin/llm2vec-gen", "train"], True),
        (["python", "-m", "pytest", "-m", "launch.train"], False),
        (["python", "-m", "pdb", "-m", "launch.train"], False),
        (["python", "-m", "launcher"], False),
        (["python", "-c", "import launch"], False),
        (["python", "script.py", "-m", "launch.train"], False),
        (["python"], False),
    ],
)
def test_only_commands_start_again(argv, expected):
    assert huge_pages._is_command(argv) == expected
