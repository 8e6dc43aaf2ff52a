"""python -m launch.encode MODEL input=FILE output=DIR [key=value ...]"""

import pathlib

import numpy as np

from launch import start
from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.config import EncodeConfig
from llm2vec_gen_jax.data import read_texts
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.files import atomic_directory, sha256_file, write_json


def main(path, config):
    from llm2vec_gen_jax import LLM2VecGen

    config_lib.require(config, "input", "output")
    output = pathlib.Path(config.output)
    if output.exists():
        raise InputError(f"output={output}: exists already. Choose another, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written fails before the work, not after it
    texts = read_texts(config.input, config.field)
    model = LLM2VecGen.from_pretrained(path, dtype=config.dtype, mesh=config.mesh)
    encoded = model.encode(
        texts,
        prompt=config.instruction,
        batch_size=config.batch_size,
        max_length=config.max_length,
        normalize_embeddings=config.normalize,
        show_progress_bar=True,
        return_soft_prompts=config.save_soft_prompts,
    )
    embeddings, soft_prompts = encoded if config.save_soft_prompts else (encoded, None)
    with atomic_directory(output) as folder:
        np.save(folder / "embeddings.npy", embeddings)
        if config.save_soft_prompts:
            np.save(folder / "soft_prompts.npy", soft_prompts)
        manifest = {
            "model": str(path),
            "backbone": model.backbone.identity,
            "input": {"file": config.input, "sha256": sha256_file(config.input)},
            "rows": len(texts),
            "dimension": model.get_embedding_dimension(),
            "config": config_lib.to_dict(config),
        }
        write_json(folder / "manifest.json", manifest)
    print(f"written: {output} ({embeddings.shape[0]} x {embeddings.shape[1]})")


if __name__ == "__main__":
    start.run(EncodeConfig, main, "MODEL")
