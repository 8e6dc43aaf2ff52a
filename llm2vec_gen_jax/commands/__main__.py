"""`llm2vec-gen COMMAND [words]`, where the package is installed: the same as `python -m launch.COMMAND [words]`."""

import ast
import importlib
import pathlib
import sys

from llm2vec_gen_jax import __version__
from llm2vec_gen_jax.common.errors import nearest


def commands():
    """Returns {name: what it does}: the modules here whose docstring says how to run them. Imports none."""
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if f"\npython -m launch.{path.stem} " in about:
            found[path.stem] = about.splitlines()[0]
    return found


def main():
    """Runs the command that the first word names. Exit codes: the command's (cli.run), 2 for an unknown one."""
    known = commands()
    name, *words = sys.argv[1:] or ["--help"]
    if name in known:
        sys.argv = [f"llm2vec-gen {name}", *words]
        importlib.import_module(f"llm2vec_gen_jax.commands.{name}").run()
    elif name in ("-h", "--help"):
        from llm2vec_gen_jax.commands import cli

        usage = "usage: llm2vec-gen COMMAND [CONFIG | MODEL] [key=value ...]\n\ncommands, each with its own --help:"
        cli.show("\n".join([usage, *(f"  {name:<14} {about}" for name, about in known.items())]))
    elif name == "--version":
        print(__version__)
    else:
        print(f"error: unknown command {name!r}{nearest(name, known)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
