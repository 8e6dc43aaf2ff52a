"""`llm2vec-gen COMMAND ...` of an installed package, equivalent to `python -m launch.COMMAND ...` in a checkout."""

import ast
import importlib
import pathlib
import sys

from llm2vec_gen_jax import __version__
from llm2vec_gen_jax.common import huge_pages
from llm2vec_gen_jax.common.errors import nearest


def commands() -> dict[str, str]:
    """Returns {command: summary} from the docstrings of this package's modules, without importing them."""
    summaries = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if f"\npython -m launch.{path.stem} " in about:
            summaries[path.stem] = about.splitlines()[0]
    return summaries


def main() -> None:
    """Runs the command named by the first argument. Exit codes: those of cli.run, 2 for an unknown command."""
    huge_pages.request()
    known = commands()
    name, *argv = sys.argv[1:] or ["--help"]
    if name in known:
        sys.argv = [f"llm2vec-gen {name}", *argv]
        importlib.import_module(f"llm2vec_gen_jax.commands.{name}").run()
    elif name in ("-h", "--help"):
        from llm2vec_gen_jax.commands import cli
        from llm2vec_gen_jax.common import terminal

        lines = ["usage: llm2vec-gen COMMAND [CONFIG | MODEL] [key=value ...]", ""]
        lines.append("commands (COMMAND --help lists the keys):")
        for name, summary in known.items():
            lines += terminal.wrap(summary, terminal.terminal_width(), " " * 17, f"  {name:<14} ")
        cli.show("\n".join(lines))
    elif name == "--version":
        print(__version__)
    else:
        print(f"error: unknown command {name!r}{nearest(name, known)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
