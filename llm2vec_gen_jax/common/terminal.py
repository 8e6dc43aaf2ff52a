"""Text for a terminal: its width, wrapped paragraphs, aligned columns, calls of commands."""

import shutil
import sys
import textwrap
from collections.abc import Sequence

_WIDEST, _NARROWEST = 120, 40  # columns


def terminal_width() -> int:
    """Returns the columns to wrap at: those of the terminal or of $COLUMNS, 80 without either, at most 120."""
    return min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)


def command_prefix() -> str:
    """Returns what precedes the name of a command: `llm2vec-gen` if this process was started by it."""
    return "llm2vec-gen " if sys.argv[0].startswith("llm2vec-gen ") else "python -m launch."


def wrap(text: str, width: int, indent: str = "", first: str | None = None) -> list[str]:
    """Returns the lines of a paragraph. Words and keys with hyphens are not broken. first: start of the first line."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def shorten(text: str, width: int) -> str:
    """Returns a text on one line, truncated to `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def align_columns(rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Returns rows of cells as lines with columns of equal width.

    A table wider than `width`, default that of the terminal, is split into tables that repeat the first column.
    """
    width = width or terminal_width()
    widths = [max(map(len, column)) for column in zip(*rows)]
    blocks: list[list[int]] = []
    for column in range(1, len(widths)):
        if not blocks or sum(widths[one] + 2 for one in (0, *blocks[-1], column)) - 2 > width:
            blocks.append([])
        blocks[-1].append(column)
    return "\n\n".join(
        "\n".join("  ".join(row[column].ljust(widths[column]) for column in (0, *block)).rstrip() for row in rows)
        for block in blocks or [[]]
    )
