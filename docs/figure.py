"""Writes docs/method.svg, the overview figure in README.md: python -m docs.figure"""

import pathlib
from xml.sax.saxutils import escape

from llm2vec_gen_jax.common.files import write_text

PICTURE = pathlib.Path(__file__).parent / "method.svg"
WIDTH, HEIGHT = 1000, 560
# (fill, border) of frozen, trained, data and result boxes. The figure has a light background of its own, so that it is
# readable on a dark page.
FROZEN, TRAINED, DATA, RESULT = (
    ("#dbe9fb", "#3b6fb6"),
    ("#ffe2b8", "#c8760a"),
    ("#f1f1f1", "#8a8a8a"),
    ("#d9f0dc", "#2f8a46"),
)
INK, LOSS = "#222222", "#b3261e"
QUERY = ["What", "is", "the", "capital", "of", "France", "?"]
ANSWER = ["The", "capital", "is", "Paris", "."]


def text(
    x: float, y: float, words: str, size: int = 15, color: str = INK, anchor: str = "middle", style: str = ""
) -> str:
    """Returns a line of text around x on the baseline y, in pixels."""
    more = f" {style}" if style else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{more}>{escape(words)}</text>'
    )


def box(x: float, y: float, width: float, height: float, kind: tuple[str, str], *lines: str, size: int = 15) -> str:
    """Returns a rectangle with centered lines of text; x, y is the upper left corner."""
    fill, border = kind
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{border}" '
        'stroke-width="1.5"/>'
    ]
    first = y + height / 2 + size * 0.35 - (len(lines) - 1) * (size + 3) / 2
    for number, line in enumerate(lines):
        bold = 'font-weight="bold"' if number == 0 and len(lines) > 1 else ""
        parts.append(text(x + width / 2, first + number * (size + 3), line, size, INK, "middle", bold))
    return "\n".join(parts)


def arrow(*points: tuple[float, float], color: str = INK, dashed: bool = False) -> str:
    """Returns a polyline through points (x, y) with an arrowhead at its end."""
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    head = "loss" if color == LOSS else "ink"
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"{dash} marker-end="url(#{head})"/>'
    )


def row(
    x: float, y: float, words: list[str], kind: tuple[str, str], width: float, gap: float = 4, size: int = 13
) -> tuple[list[str], list[float]]:
    """Returns adjacent boxes of equal width, and their horizontal centers."""
    step = width + gap
    boxes = [box(x + number * step, y, width, 26, kind, word, size=size) for number, word in enumerate(words)]
    return boxes, [x + number * step + width / 2 for number in range(len(words))]


def encoder() -> list[str]:
    """Left half: query and compression tokens, frozen LLM, two heads, embedding."""
    query, query_x = row(30, 440, QUERY, DATA, 50)
    tokens, tokens_x = row(412, 440, ["c₁", "⋯", "cₖ"], TRAINED, 34)
    states, _ = row(412, 312, ["h₁", "⋯", "hₖ"], DATA, 34)
    prompts, prompts_x = row(412, 196, ["r₁", "⋯", "rₖ"], DATA, 34)
    parts = [*query, *tokens, box(30, 366, 492, 44, FROZEN, "LLM, frozen", "one causal pass", size=14), *states]
    parts += [arrow((x, 438), (x, 414)) for x in query_x + tokens_x]
    parts += [arrow((x, 364), (x, 342)) for x in tokens_x]
    parts += [box(372, 254, 190, 32, TRAINED, "reconstruction head"), arrow((467, 310), (467, 290)), *prompts]
    parts += [arrow((467, 252), (467, 226)), box(372, 138, 190, 32, TRAINED, "alignment head, mean")]
    parts += [
        arrow((467, 194), (467, 174)),
        box(412, 80, 110, 32, RESULT, "embedding e"),
        arrow((467, 136), (467, 116)),
    ]
    parts += [text(205, 486, "query", 14), text(467, 486, "compression tokens", 14)]
    parts += [text(404, 214, "soft prompts", 14, anchor="end"), text(404, 330, "last hidden states", 14, anchor="end")]
    return parts


def reconstruction() -> list[str]:
    """Middle: conditioned on the soft prompts, the frozen LLM predicts each next token of the response."""
    prompts, prompts_x = row(600, 440, ["r₁", "⋯", "rₖ"], DATA, 30)
    answer, answer_x = row(706, 440, ["a₁", "a₂", "⋯"], DATA, 30)
    parts = [*prompts, *answer, box(600, 366, 204, 44, FROZEN, "LLM, frozen", "the same one", size=14)]
    parts += [arrow((x, 438), (x, 414)) for x in prompts_x + answer_x]
    parts += [arrow((526, 209), (580, 209), (580, 453), (597, 453))]
    guesses, guesses_x = row(672, 312, ["a₁", "a₂", "⋯", "aₛ"], DATA, 30)
    parts += [*guesses, *[arrow((x, 364), (x, 342)) for x in guesses_x]]
    parts += [text(736, 276, "reconstruction loss:", 14, LOSS, style='font-weight="bold"')]
    parts += [text(736, 294, "cross-entropy of the response", 14, LOSS)]
    return parts


def alignment() -> list[str]:
    """Right: the teacher's vector of the response, and the loss between it and the embedding."""
    parts = [box(868, 366, 104, 44, FROZEN, "teacher", "frozen", size=14), box(868, 80, 104, 32, RESULT, "target t")]
    parts += [arrow((920, 364), (920, 116))]
    parts += [arrow((864, 96), (526, 96), color=LOSS, dashed=True)]
    parts += [text(695, 66, "alignment loss:", 14, LOSS, style='font-weight="bold"')]
    parts += [text(695, 84, "mean squared error of e and t", 14, LOSS)]
    parts += [box(706, 500, 266, 34, DATA, f"response: {' '.join(ANSWER[:-1])}{ANSWER[-1]}", size=14)]
    parts += [arrow((772, 498), (772, 470)), arrow((920, 498), (920, 414))]
    parts += [arrow((205, 492), (205, 517), (702, 517), dashed=True)]
    parts += [text(440, 511, "the same LLM writes the response once, before training", 14)]
    return parts


def legend() -> list[str]:
    """Color legend."""
    parts, x = [], 30
    for kind, words, width in ((TRAINED, "trained", 86), (FROZEN, "frozen", 82), (DATA, "data and states", 138)):
        parts += [box(x, 24, 22, 16, kind), text(x + 30, 37, words, 14, anchor="start")]
        x += width + 22
    return parts


def picture() -> str:
    """Returns the SVG."""
    marker = (
        '<marker id="{0}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,1 L9,5 L0,9 z" fill="{1}"/></marker>'
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">',
        "<title>LLM2Vec-Gen: compression tokens, two heads, two losses</title>",
        f"<defs>{marker.format('ink', INK)}{marker.format('loss', LOSS)}</defs>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12" fill="#ffffff" stroke="#c9c9c9"/>',
        *legend(),
        *encoder(),
        *reconstruction(),
        *alignment(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    write_text(PICTURE, picture())
    print(f"written: {PICTURE}")
