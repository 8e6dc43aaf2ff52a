"""Text tables of the lenses' results, one per text (and layer), as wide as the terminal."""

import itertools
from collections.abc import Mapping
from typing import Any

from llm2vec_gen_jax.common.terminal import shorten, terminal_width, wrap

_OVERALL_WORDS = 8  # words shown over all compression tokens
_LONGEST, _SHORTEST = 14, 6  # characters of a word
_CONTEXT = 40  # characters shown before and after a word


def logit_table(row: Mapping[str, Any]) -> str:
    """Returns a line per compression token: its top tokens or words with probabilities.

    Words are truncated to fit, then the line is continued. row: text; tokens: a list of {text, probability} per
    compression token; optionally words, over all tokens.
    """
    width = terminal_width()
    lines = [shorten(row["text"], width)]
    words = [
        f"{word['text']} {word['probability']:.3f}" for word in itertools.islice(row.get("words", []), _OVERALL_WORDS)
    ]
    if words:
        lines += wrap("over all tokens: " + ", ".join(words), width, "  ", "")
    columns = list(itertools.zip_longest(*row["tokens"]))
    for longest in range(_LONGEST, _SHORTEST - 1, -1):
        sizes = [min(max(len(_shown(cell["text"])) for cell in column if cell), longest) for column in columns]
        if 4 + sum(size + 8 for size in sizes) <= width:
            break
    for number, candidates in enumerate(row["tokens"], 1):
        line = f"{number:>4}"
        for candidate, size in zip(candidates, sizes):
            cell = f"  {_cell(candidate['text'], size)} {candidate['probability']:.3f}"
            if len(line) + len(cell) > width:
                lines.append(line)
                line = " " * 4
            line += cell
        lines.append(line)
    return "\n".join(lines)


def neighbor_table(row: Mapping[str, Any]) -> str:
    """Returns a line per neighbor: compression token, word, cosine similarity, layer, and the word in its sentence.

    row: text, layer; tokens: a list of {word, cosine, layer, before, after} per compression token.
    """
    width = terminal_width()
    end = f"   [layer {row['layer']}]"
    lines = [shorten(row["text"], width - len(end)) + end]
    for number, neighbors in enumerate(row["tokens"], 1):
        for rank, neighbor in enumerate(neighbors):
            word, layer = neighbor["word"], neighbor["layer"]
            token = f"{number:>4}" if rank == 0 else " " * 4
            start = f"{token}  {_cell(word, _LONGEST)} {neighbor['cosine']:.3f}  layer {layer:>2}  "
            context = min(max((width - len(start) - len(word) - 2) // 2, 0), _CONTEXT)
            before = neighbor["before"][max(len(neighbor["before"]) - context, 0) :]
            sentence = f"{before}[{word}]{neighbor['after'][:context]}"
            lines.append(start + shorten(sentence, max(width - len(start), 1)))
    return "\n".join(lines)


def _shown(text: str) -> str:
    return text if text.isprintable() and text.strip() else repr(text)


def _cell(text: str, width: int) -> str:
    """Returns a text padded or truncated to `width`; blank and unprintable texts are shown as their repr."""
    text = _shown(text)
    return f"{text[: width - 1] + '…' if len(text) > width else text:<{width}}"
