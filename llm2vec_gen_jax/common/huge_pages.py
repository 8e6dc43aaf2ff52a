"""Huge pages for the memory of a process on Linux.

XLA's CPU client allocates the temporary memory of a program anew in every call: with pages of 4 KiB, a training step of
SmolLM2-135M has 400,000 page faults.
"""

import itertools
import os
import sys

_TUNABLE = "glibc.malloc.hugetlb"
_SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"


def request() -> None:
    """Restarts the process of a command, once, with huge pages for large allocations, if the kernel offers them.

    glibc reads this setting only at the start of a process. GLIBC_TUNABLES=glibc.malloc.hugetlb=0 prevents the restart.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables or not _is_command(sys.orig_argv) or not _are_offered():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_command(argv: list[str]) -> bool:
    """Whether the command line of this process runs a command, and not, for example, a test or a debugger."""
    options = list(itertools.takewhile(lambda word: word.startswith("-") and word != "-m", argv[1:]))
    program, *arguments = argv[1 + len(options) :] or [""]
    if program == "-m":
        return arguments[0].split(".")[0] == "launch" or arguments[0] == "llm2vec_gen_jax.commands"
    return os.path.basename(program) == "llm2vec-gen"


def _are_offered() -> bool:
    """Whether glibc knows the setting (2.35) and the kernel gives huge pages to those who request them."""
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION") or ""
        with open(_SETTING, encoding="ascii") as file:
            offered = "[madvise]" in file.read()
        major, minor = map(int, version.split()[1].split(".")[:2])
        return offered and (major, minor) >= (2, 35)
    except (OSError, ValueError, IndexError):  # another operating system or C library
        return False
