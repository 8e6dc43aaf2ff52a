"""What every command does first and last: arguments, compilation cache, errors to exit codes."""

import logging
import os
import sys
import textwrap
import traceback

from llm2vec_gen_jax import options
from llm2vec_gen_jax.config import DistributedConfig, ShardConfig
from llm2vec_gen_jax.download import cache_folder
from llm2vec_gen_jax.errors import InputError, nearest


def run_one_of(actions):
    """`python -m launch.NAME ACTION MODEL [key=value ...]`. actions: {name: (schema, command(model, config))}."""
    action, *words = sys.argv[1:] or ["--help"]
    if action in actions:
        run(*actions[action], positional="MODEL", words=words)
    elif action in ("-h", "--help"):
        print("\n\n".join(_help(schema, "MODEL") for schema, _ in actions.values()))
    else:
        print(f"error: unknown action {action!r}{nearest(action, actions)}", file=sys.stderr)
        sys.exit(2)


def run(schema, command, positional="CONFIG", words=None):
    """Parses the command line into `schema` and calls command(config); command(model, config) for a MODEL;
    command(files, configs) for CONFIG... (one config per file; key=value pairs override each).

    words: what follows the command's name, default sys.argv.
    Exit codes: 0 done, 1 failed, 2 bad input (the message says what and how to mend it), 3 stopped by SIGTERM and
    saved, 75 another process of the run ended, 76 no progress, 130 interrupted.
    """
    words = sys.argv[1:] if words is None else words
    if any(word in ("-h", "--help") for word in words):
        print(_help(schema, positional))
        return
    try:
        paired = [word for word in words if "=" in word and not os.path.exists(word)]  # a path may hold a =
        free = [word for word in words if word not in paired]
        if (len(free) > 1 and positional != "CONFIG...") or any(word.startswith("-") for word in free):
            raise InputError(f"cannot read {' '.join(map(repr, free))}: expected one {positional} and key=value pairs")
        if positional == "MODEL" and not free:
            raise InputError("which model? Give a model directory or hub id first")
        files = free if positional != "MODEL" else []
        configs = [options.load(schema, file, paired) for file in files or [None]]
        if positional == "CONFIG..." and not files:
            raise InputError("which configs? Give one or more YAML files first")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    _prepare()
    if positional == "CONFIG...":
        _call(configs[0], command, files, configs)
    elif positional == "MODEL":
        _call(configs[0], command, free[0], configs[0])
    else:
        _call(configs[0], command, configs[0])


def _call(config, command, *arguments):
    import jax

    from llm2vec_gen_jax import distributed

    try:
        if isinstance(config, DistributedConfig):
            shared = hasattr(config, "shard")  # work that is split once and for all: nobody waits for anybody
            distributed.start(config, together=not shared)
            values = {key: value for key, value in options.to_dict(config).items() if key != "process_id"}
            distributed.agree({"code": distributed.code_version(), "config": values})
            if shared and jax.process_count() > 1:
                if config.shard.count > 1:
                    raise InputError(
                        f"shard.count={config.shard.count}: joined processes take a share each; leave it out"
                    )
                config.shard = ShardConfig(jax.process_index(), jax.process_count())
        command(*arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.leave(distributed.BAD_INPUT)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.leave(1)
    except distributed.Preempted as error:
        print(f"{error}. Repeat the command to go on", file=sys.stderr)
        sys.exit(distributed.PREEMPTED)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        first = str(error).strip().splitlines()[0]
        print(f"error: {first}. If another process ended, what it printed says why", file=sys.stderr)
        distributed.leave(distributed.PEER_FAILED)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)  # a full disk, no permission
        distributed.leave(1)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is half written, repeat the command to go on", file=sys.stderr)
        distributed.leave(130)
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        distributed.leave(1)


def _prepare():
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save
    import jax

    # Programs compiled by an earlier run are read back; set JAX_COMPILATION_CACHE_DIR to keep them elsewhere.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def _help(schema, positional):
    lines = textwrap.dedent(" " * 4 + schema.__doc__).strip().splitlines()
    name = lines[0].split("`")[1].removeprefix("python -m launch.").removesuffix(" MODEL")
    about_command = lines[0].split("`: ", 1)[1]
    first = "[CONFIG]" if positional == "CONFIG" else positional
    about = {
        "MODEL": "MODEL is a model directory or a hub id.",
        "CONFIG": "CONFIG is a YAML file (see configs/); key=value pairs override it.",
        "CONFIG...": "Each CONFIG is a YAML file (see configs/ablations/); key=value pairs override all of them.",
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
            options.help_text(schema),
        ]
    )
