"""Converts models to and from PyTorch, and compares both frameworks.

python -m launch.convert from_pytorch | to_pytorch | verify MODEL [key=value ...]
"""

import os
import pathlib
import sys

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import UNFINISHED, remove_unfinished, require_new
from llm2vec_gen_jax.config import FromPytorchConfig, ToPytorchConfig, VerifyConfig, hub_options, options


def from_pytorch(path: str, config: FromPytorchConfig) -> None:
    """Writes a published model as a model directory, with its heads unchanged."""
    from llm2vec_gen_jax import LLM2VecGen

    options.require(config)
    output = str(config.output)
    require_new(output, "output")
    hub = vars(hub_options(config, config.revision))
    embedder = LLM2VecGen.from_pretrained(path, dtype=config.dtype, backbone=config.backbone, mesh=config.mesh, **hub)
    embedder.save_pretrained(output, backbone=config.backbone)
    print(f"written: {output}")


def to_pytorch(path: str, config: ToPytorchConfig) -> None:
    """Writes a model directory, a merged encoder, or both, and the backbone if PyTorch cannot read the original."""
    from llm2vec_gen_jax.pretrained import model_directory
    from llm2vec_gen_jax.pretrained.backbone import resolve_path

    if (run := pathlib.Path(path) / "model").is_dir():
        path = str(run)  # a run directory
    if not (config.output or config.merged):
        raise InputError("output is required: pass output=DIR (model directory), merged=DIR (plain encoder) or both")
    hub = hub_options(config, config.revision)
    source = model_directory.backbone_source(model_directory.read_model_directory(path, hub), hub, config.backbone)
    if config.output and not config.backbone_output and resolve_path(*source).suffix == ".gguf":
        config.backbone_output = f"{config.output}-backbone"  # PyTorch cannot load a GGUF file
        cli.lock_outputs(_to_pytorch, "backbone_output")(path, config)
    else:
        _to_pytorch(path, config)


def _to_pytorch(path: str, config: ToPytorchConfig) -> None:
    from llm2vec_gen_jax import LLM2VecGen
    from llm2vec_gen_jax.pretrained import export

    hub = vars(hub_options(config, config.revision))
    embedder = LLM2VecGen.from_pretrained(path, dtype=config.dtype, backbone=config.backbone, mesh=config.mesh, **hub)
    folder = config.backbone_output
    targets = {"backbone_output": folder, "merged": config.merged, "output": config.output}
    folders = {key: target for key, target in targets.items() if target}
    *parts, last = folders.values()  # written in this order: if the last exists, all do
    if not os.path.lexists(last):
        remove_unfinished(*parts)
    for key, target in folders.items():
        require_new(target, key)
    if folder:
        export.save_backbone(embedder.backbone, folder, unfinished=folder in parts)
        print(f"written: {folder} (the backbone, {embedder.backbone.architecture.num_parameters:,} weights)")
    if config.merged:
        export.save_merged(embedder, config.merged, unfinished=config.merged in parts)
        print(f"written: {config.merged}")
    if config.output:
        embedder.save_pretrained(config.output, None if config.torch_dtype == "auto" else config.torch_dtype, folder)
        print(f"written: {config.output}")
    for part in parts:
        pathlib.Path(part, UNFINISHED).unlink(missing_ok=True)


def verify(path: str, config: VerifyConfig) -> None:
    """Prints the comparison of both frameworks; exit code 1 if they differ, 2 if they were not compared."""
    from llm2vec_gen_jax.integrations.verify import verify

    hub = hub_options(config, config.revision)
    report = verify(path, config.python or sys.executable, config.backbone, config.max_new_tokens, hub)
    print(report)
    if not report.passed:
        sys.exit(2 if report.verdict == "NOT COMPARED" else 1)


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run_action(
        str(__doc__),
        {
            "from_pytorch": (FromPytorchConfig, cli.lock_outputs(from_pytorch)),
            "to_pytorch": (ToPytorchConfig, cli.lock_outputs(to_pytorch, "output", "merged", "backbone_output")),
            "verify": (VerifyConfig, verify),
        },
    )
