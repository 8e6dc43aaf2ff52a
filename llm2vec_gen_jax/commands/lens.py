"""What an embedding holds: words, nearest contexts, answers, one HTML page.

python -m launch.lens logit | build_index | query | generations | report MODEL [key=value ...]
"""

import itertools
import json

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import require_new, write_text
from llm2vec_gen_jax.config import (
    BuildIndexConfig,
    GenerationsConfig,
    LogitLensConfig,
    QueryIndexConfig,
    ReportConfig,
    options,
)
from llm2vec_gen_jax.data.texts import read_texts


def logit(path, config):
    """The top of the vocabulary for each compression token, as a table or JSONL."""
    from llm2vec_gen_jax import LLM2VecGen
    from llm2vec_gen_jax.lens.logit import over_tokens

    texts = _texts(config)
    model = LLM2VecGen.from_pretrained(path, config.dtype, mesh=config.mesh, attention=config.kernels.attention)
    more = {key: getattr(config, key) for key in ("state", "words", "stop_words", "batch_size", "max_length")}
    found = model.logit_lens(texts, config.top_k, **more, show_progress_bar=config.text is None)
    rows = []
    for text, tokens in zip(texts, found):
        rows.append({"text": text, "tokens": [[one._asdict() for one in token] for token in tokens]})
        if config.words:
            rows[-1]["words"] = [one._asdict() for one in over_tokens(tokens)]
    _write(config, rows, _logit_table)


def build_index(path, config):
    """Keeps hidden states of a corpus for `query`."""
    from llm2vec_gen_jax.lens.index import build_index

    count = build_index(path, config)
    print(f"written: {config.output} ({count} contexts)")


def query(path, config):
    """The nearest contexts of each compression token, as a table or JSONL."""
    from llm2vec_gen_jax import LLM2VecGen
    from llm2vec_gen_jax.lens.search import Index, latent_lens

    options.require(config, "index")
    texts = _texts(config)
    model = LLM2VecGen.from_pretrained(path, config.dtype, mesh=config.mesh, attention=config.kernels.attention)
    index = Index(config.index, model.backbone)
    more = {key: getattr(config, key) for key in ("top_k", "layers", "same_layer", "batch_size", "max_length")}
    found = latent_lens(model, index, texts, **more, show_progress_bar=config.text is None)
    rows = [
        {"text": text, "layer": layer, "tokens": [[one._asdict() for one in token] for token in tokens]}
        for text, layers in zip(texts, found)
        for layer, tokens in layers.items()
    ]
    _write(config, rows, _latent_table)


def generations(path, config):
    """The published script's table of texts and what is decoded from their embeddings."""
    from llm2vec_gen_jax import LLM2VecGen
    from llm2vec_gen_jax.lens import generations

    options.require(config, "input", "output")
    generations.check_output(config.output)
    texts = generations.sample(read_texts(config.input, config.field), config.limit, config.seed)
    model = LLM2VecGen.from_pretrained(path, config.dtype, mesh=config.mesh, attention=config.kernels.attention)
    sizes = config.max_new_tokens, config.batch_size, config.max_length
    generations.write_table(config.output, generations.generations(model, texts, *sizes, show_progress_bar=True))
    print(f"written: {config.output} ({len(texts)} texts)")


def report(path, config):
    """One HTML page of everything that the embeddings of some texts hold."""
    from llm2vec_gen_jax import LLM2VecGen
    from llm2vec_gen_jax.lens.report import write_report

    options.require(config, "input", "output")
    require_new(config.output, "output")
    texts = read_texts(config.input, config.field)[: config.limit]
    model = LLM2VecGen.from_pretrained(path, config.dtype, mesh=config.mesh, attention=config.kernels.attention)
    write_report(model, texts, path, config)
    print(f"written: {config.output} ({len(texts)} texts)")


def _texts(config):
    given = [key for key in ("text", "input") if getattr(config, key) is not None]
    if len(given) != 1:
        raise InputError(f"give one of text= and input=, found {' and '.join(given) or 'none'}")
    if config.output:
        require_new(config.output, "output")
    return [config.text] if config.text is not None else read_texts(config.input, config.field)[: config.limit]


def _write(config, rows, table):
    if config.output:
        write_text(config.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"written: {config.output} ({len(rows)} lines)")
    else:
        print("\n\n".join(map(table, rows)))


def _logit_table(row):
    """A line for each compression token: what it ranks first, with probabilities."""
    words = [f"{word['text']} {word['probability']:.3f}" for word in itertools.islice(row.get("words", []), 8)]
    heading = [row["text"]] + (["over all tokens: " + ", ".join(words)] if words else [])
    lines = []
    for number, token in enumerate(row["tokens"], 1):
        shown = [f"{_cell(one['text'], 14)} {one['probability']:.3f}" for one in token]
        lines.append(f"{number:>4}  {'  '.join(shown)}".rstrip())
    return "\n".join(heading + lines)


def _latent_table(row):
    """A line for each neighbour: compression token, cosine, its layer, and its word in the sentence."""
    lines = [f"{row['text']}   [layer {row['layer']}]"]
    for number, token in enumerate(row["tokens"], 1):
        for rank, one in enumerate(token):
            sentence = " ".join(f"{one['before'][-40:]}[{one['word']}]{one['after'][:40]}".split())
            first = f"{number:>4}" if rank == 0 else " " * 4
            lines.append(f"{first}  {_cell(one['word'], 16)} {one['cosine']:.3f}  layer {one['layer']:>2}  {sentence}")
    return "\n".join(lines)


def _cell(text, width):
    """Text that cannot break a line of a terminal, in a column."""
    shown = text if text.isprintable() and text.strip() else repr(text)
    return f"{shown[: width - 1] + '…' if len(shown) > width else shown:<{width}}"


def run():
    """Runs the command with the words of sys.argv."""
    cli.run_one_of(
        {
            "logit": (LogitLensConfig, cli.alone(logit)),
            "build_index": (BuildIndexConfig, build_index),
            "query": (QueryIndexConfig, cli.alone(query)),
            "generations": (GenerationsConfig, cli.alone(generations)),
            "report": (ReportConfig, cli.alone(report)),
        }
    )
