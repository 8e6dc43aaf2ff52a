"""Writes the text that the LLM reads out of embeddings.

python -m launch.decode MODEL text="..." | input=FILE | soft_prompts=FILE.npy|FOLDER [key=value ...]
"""

import json
import os

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import read_array, write_text
from llm2vec_gen_jax.config import DecodeConfig
from llm2vec_gen_jax.data.texts import read_texts
from llm2vec_gen_jax.inference.shards import load_soft_prompts


def main(path, config):
    """Writes or prints a line {text, decoded} for each text, {decoded} for each soft prompt."""
    from llm2vec_gen_jax import LLM2VecGen

    given = [key for key in ("text", "input", "soft_prompts") if getattr(config, key) is not None]
    if len(given) != 1:
        raise InputError(f"give one of text=, input= and soft_prompts=, found {' and '.join(given) or 'none'}")
    texts = None
    if config.soft_prompts is not None:
        if os.path.isdir(config.soft_prompts):
            soft_prompts = load_soft_prompts(config.soft_prompts)
        else:
            soft_prompts = read_array(config.soft_prompts, "soft_prompts")
    else:
        texts = [config.text] if config.text is not None else read_texts(config.input, config.field)
    model = LLM2VecGen.from_pretrained(path, config.dtype, mesh=config.mesh, attention=config.kernels.attention)
    if texts is not None:
        _, soft_prompts = model.encode(
            texts, batch_size=config.batch_size, max_length=config.max_length, return_soft_prompts=True
        )
    sampling = config.max_new_tokens, config.temperature, config.top_p, config.seed, config.batch_size
    decoded = model.decode(soft_prompts, *sampling, show_progress_bar=config.text is None)
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


def run():
    """Runs the command with the words of sys.argv."""
    cli.run(DecodeConfig, cli.alone(main), "MODEL")
