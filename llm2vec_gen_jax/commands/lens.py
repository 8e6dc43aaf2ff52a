"""Interprets embeddings: logit lens, latent lens, decoded text, HTML report.

python -m launch.lens logit | build_index | query | generations | report MODEL [key=value ...]
"""

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
    hub_options,
    options,
)
from llm2vec_gen_jax.data.texts import read_texts
from llm2vec_gen_jax.lens.tables import logit_table, neighbor_table


def logit(path: str, config: LogitLensConfig) -> None:
    """Writes the top vocabulary entries of each compression token, as a table or JSONL."""
    from llm2vec_gen_jax.lens.logit import over_tokens

    texts = _texts(config)
    embedder = cli.load_embedder(path, config)
    more = {key: getattr(config, key) for key in ("state", "words", "stop_words", "batch_size", "max_length")}
    results = embedder.logit_lens(texts, config.top_k, **more, show_progress_bar=config.text is None)
    rows = []
    for text, tokens in zip(texts, results):
        row = {"text": text, "tokens": [_dicts(candidates) for candidates in tokens]}
        rows.append(row | {"words": _dicts(over_tokens(tokens))} if config.words else row)
    _write(config, rows, logit_table)


def build_index(path: str, config: BuildIndexConfig) -> None:
    """Writes an index of hidden states of a corpus, for `query`."""
    from llm2vec_gen_jax.lens.index import build_index

    count = build_index(path, config)
    print(f"written: {config.output} ({count} contexts)")


def query(path: str, config: QueryIndexConfig) -> None:
    """Writes the nearest contexts of each compression token, as a table or JSONL."""
    from llm2vec_gen_jax.lens.search import Index, latent_lens

    (folder,) = options.require(config)
    texts = _texts(config)
    embedder = cli.load_embedder(path, config)
    index = Index(folder, embedder.backbone)
    more = {key: getattr(config, key) for key in ("top_k", "layers", "same_layer", "batch_size", "max_length")}
    results = latent_lens(embedder, index, texts, **more, show_progress_bar=config.text is None)
    rows = [
        {"text": text, "layer": layer, "tokens": [_dicts(neighbors) for neighbors in tokens]}
        for text, layers in zip(texts, results)
        for layer, tokens in layers.items()
    ]
    _write(config, rows, neighbor_table)


def generations(path: str, config: GenerationsConfig) -> None:
    """Writes the published script's table of texts and the texts decoded from their embeddings."""
    from llm2vec_gen_jax.lens import generations

    source, output = options.require(config)
    generations.check_output(output)
    texts = generations.sample(read_texts(source, config.field, hub_options(config)), config.limit, config.seed)
    embedder = cli.load_embedder(path, config)
    sizes = config.max_new_tokens, config.batch_size, config.max_length
    generations.write_table(output, generations.generations(embedder, texts, *sizes, show_progress_bar=True))
    print(f"written: {config.output} ({len(texts)} texts)")


def report(path: str, config: ReportConfig) -> None:
    """Writes an HTML page about the embeddings of some texts."""
    from llm2vec_gen_jax.lens.report import write_report

    source, output = options.require(config)
    require_new(output, "output")
    texts = read_texts(source, config.field, hub_options(config))[: config.limit]
    embedder = cli.load_embedder(path, config)
    write_report(embedder, texts, path, config)
    print(f"written: {config.output} ({len(texts)} texts)")


def _texts(config):
    keys = [key for key in ("text", "input") if getattr(config, key) is not None]
    if len(keys) != 1:
        raise InputError(f"expected one of text= and input=, found {' and '.join(keys) or 'none'}")
    if config.output:
        require_new(config.output, "output")
    if config.text is not None:
        return [config.text]
    return read_texts(config.input, config.field, hub_options(config))[: config.limit]


def _dicts(results):
    return [result._asdict() for result in results]


def _write(config, rows, table):
    if config.output:
        write_text(config.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"written: {config.output} ({len(rows)} lines)")
    else:
        print("\n\n".join(map(table, rows)))


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run_action(
        str(__doc__),
        {
            "logit": (LogitLensConfig, cli.lock_outputs(logit)),
            "build_index": (BuildIndexConfig, build_index),
            "query": (QueryIndexConfig, cli.lock_outputs(query)),
            "generations": (GenerationsConfig, cli.lock_outputs(generations)),
            "report": (ReportConfig, cli.lock_outputs(report)),
        },
    )
