"""What every command does first and last: arguments, compilation cache, errors to exit codes."""

import logging
import os
import sys
import textwrap

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.download import cache_folder
from llm2vec_gen_jax.errors import InputError


def run(schema, command, positional="CONFIG"):
    """Parses sys.argv into `schema` and calls command(config), or command(model, config) when positional is MODEL.

    Exit codes: 0 done, 1 failed, 2 bad input (the message says what and how to mend it), 130 interrupted.
    """
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        print(_help(schema, positional))
        return
    try:
        free = [word for word in words if "=" not in word]
        if len(free) > 1 or any(word.startswith("-") for word in free):
            raise InputError(f"cannot read {' '.join(map(repr, free))}: expected one {positional} and key=value pairs")
        if positional == "MODEL" and not free:
            raise InputError("which model? Give a model directory or hub id first")
        overrides = [word for word in words if "=" in word]
        file = free[0] if positional == "CONFIG" and free else None
        config = config_lib.load(schema, file, overrides)
        _prepare()
        command(free[0], config) if positional == "MODEL" else command(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)  # a full disk, no permission
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is half written, repeat the command to go on", file=sys.stderr)
        sys.exit(130)


def _prepare():
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save
    import jax

    # Programs compiled by an earlier run are read back; set JAX_COMPILATION_CACHE_DIR to keep them elsewhere.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def _help(schema, positional):
    lines = textwrap.dedent(" " * 4 + schema.__doc__).strip().splitlines()
    name = lines[0].split("`")[1].removeprefix("python -m launch.").split()[0]
    about_command = lines[0].split("`: ", 1)[1]
    first = "MODEL" if positional == "MODEL" else "[CONFIG]"
    about = {
        "MODEL": "MODEL is a model directory or a hub id.",
        "CONFIG": "CONFIG is a YAML file (see configs/); key=value pairs override it.",
    }[positional]
    return "\n".join(
        [
            f"usage: python -m launch.{name} {first} [key=value ...]",
            "",
            about_command[0].upper() + about_command[1:],
            about,
            *lines[1:],
            "",
            "keys and their defaults:",
            config_lib.help_text(schema),
        ]
    )
