"""Decodes embeddings into text.

python -m launch.decode MODEL text="..." | input=FILE | soft_prompts=FILE.npy|FOLDER [key=value ...]
"""

import json
import os

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import read_array, require_new, write_text
from llm2vec_gen_jax.config import DecodeConfig, hub_options
from llm2vec_gen_jax.data.texts import read_texts
from llm2vec_gen_jax.inference.shards import load_soft_prompts


def main(path: str, config: DecodeConfig) -> None:
    """Writes or prints JSON lines: {text, decoded} per text, or {decoded} per soft prompt."""
    keys = [key for key in ("text", "input", "soft_prompts") if getattr(config, key) is not None]
    if len(keys) != 1:
        raise InputError(f"expected one of text=, input= and soft_prompts=, found {' and '.join(keys) or 'none'}")
    if config.output:
        require_new(config.output, "output")
    texts = None
    if config.soft_prompts is not None:
        if os.path.isdir(config.soft_prompts):
            soft_prompts = load_soft_prompts(config.soft_prompts)
        else:
            soft_prompts = read_array(config.soft_prompts, "soft_prompts")
    else:
        hub = hub_options(config)
        texts = [config.text] if config.text is not None else read_texts(str(config.input), config.field, hub)
    embedder = cli.load_embedder(path, config)
    if texts is not None:
        _, soft_prompts = embedder.encode(
            texts, batch_size=config.batch_size, max_length=config.max_length, return_soft_prompts=True
        )
    sampling = config.max_new_tokens, config.temperature, config.top_p, config.seed, config.batch_size
    decoded = embedder.decode(soft_prompts, *sampling, show_progress_bar=config.text is None)
    decoded = [decoded] if isinstance(decoded, str) else decoded
    rows = [{"decoded": text} for text in decoded]
    if texts is not None:
        rows = [{"text": text, **row} for text, row in zip(texts, rows)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if config.output:
        write_text(config.output, lines)
        print(f"written: {config.output} ({len(rows)} lines)")
    else:
        print(lines, end="")


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run(DecodeConfig, cli.lock_outputs(main), "MODEL")
