"""Text tables of the lenses' results, one per text (and layer)."""

import itertools
from collections.abc import Mapping
from typing import Any

_OVERALL_WORDS = 8  # words shown over all compression tokens
_CONTEXT = 40  # characters shown before and after a word


def logit_table(row: Mapping[str, Any]) -> str:
    """Returns a line per compression token: its top tokens or words with probabilities.

    row: text; tokens: a list of {text, probability} per compression token; optionally words, over all tokens.
    """
    lines = [row["text"]]
    words = [
        f"{word['text']} {word['probability']:.3f}" for word in itertools.islice(row.get("words", []), _OVERALL_WORDS)
    ]
    if words:
        lines.append("over all tokens: " + ", ".join(words))
    for number, candidates in enumerate(row["tokens"], 1):
        cells = [f"{_cell(candidate['text'], 14)} {candidate['probability']:.3f}" for candidate in candidates]
        lines.append(f"{number:>4}  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def neighbor_table(row: Mapping[str, Any]) -> str:
    """Returns a line per neighbor: compression token, word, cosine similarity, layer, and the word in its sentence.

    row: text, layer; tokens: a list of {word, cosine, layer, before, after} per compression token.
    """
    lines = [f"{row['text']}   [layer {row['layer']}]"]
    for number, neighbors in enumerate(row["tokens"], 1):
        for rank, neighbor in enumerate(neighbors):
            word, layer = neighbor["word"], neighbor["layer"]
            sentence = " ".join(f"{neighbor['before'][-_CONTEXT:]}[{word}]{neighbor['after'][:_CONTEXT]}".split())
            token = f"{number:>4}" if rank == 0 else " " * 4
            lines.append(f"{token}  {_cell(word, 16)} {neighbor['cosine']:.3f}  layer {layer:>2}  {sentence}")
    return "\n".join(lines)


def _cell(text: str, width: int) -> str:
    """Returns a text padded or truncated to `width`; blank and unprintable texts are shown as their repr."""
    text = text if text.isprintable() and text.strip() else repr(text)
    return f"{text[: width - 1] + '…' if len(text) > width else text:<{width}}"
