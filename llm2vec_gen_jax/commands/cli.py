"""Shared entry code of all commands: arguments, devices, compilation cache, exit codes."""

import contextlib
import errno
import functools
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm2vec_gen_jax.common import locks, terminal
from llm2vec_gen_jax.common.errors import InputError, first_line, nearest, one_line
from llm2vec_gen_jax.common.files import SHIPPED, require_written
from llm2vec_gen_jax.common.terminal import command_prefix
from llm2vec_gen_jax.config import (
    HUB_KEYS,
    DistributedConfig,
    ReproduceConfig,
    ShardConfig,
    TrackingConfig,
    help,
    options,
)
from llm2vec_gen_jax.parallel import devices, preemption
from llm2vec_gen_jax.pretrained.default_backbone import cache_folder

if TYPE_CHECKING:
    from llm2vec_gen_jax import LLM2VecGen

# Errors of a path that a command cannot read or write: repeating it does not help.
_PATH_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST),
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_INTERRUPTED = "\ninterrupted; lines and files written so far are complete. Repeat the command to resume"


def run_action(about: str, actions: Mapping[str, tuple[type, Callable[..., None]]]) -> None:
    """Runs `python -m launch.NAME ACTION MODEL [key=value ...]`.

    about: the docstring of the command's module. actions: {name: (schema, command(model, config))}.
    """
    action, *argv = sys.argv[1:] or ["--help"]
    if action in actions:
        run(*actions[action], positional="MODEL", argv=argv)
    elif action in ("-h", "--help"):
        show(_actions_help(about, {name: schema for name, (schema, _) in actions.items()}))
    else:
        print(f"error: unknown action {action!r}{nearest(action, actions)}", file=sys.stderr)
        sys.exit(2)


def run(
    schema: type, command: Callable[..., None], positional: str = "CONFIG", argv: Sequence[str] | None = None
) -> None:
    """Parses the command line into `schema` and runs a command.

    positional: "CONFIG" calls command(config); "MODEL" calls command(model, config); "CONFIG..." calls
    command(files, configs) with one config per file, each overridden by the key=value arguments.
    argv: the arguments after the command's name, default sys.argv[1:].
    Exit codes: 0 done, 1 failed, 2 invalid input, 3 stopped by SIGTERM or Ctrl-C after saving, 74 write error, 75
    another process of the run failed, 76 no progress, 130 interrupted.
    """
    _open_streams()
    argv = sys.argv[1:] if argv is None else argv
    if any(argument in ("-h", "--help") for argument in argv):
        show(_help(schema, positional))
        return
    try:
        arguments, config = _parse(schema, positional, argv)
    except (InputError, OSError) as error:
        print(f"error: {_os_error_line(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        sys.exit(2)
    trains = isinstance(config, TrackingConfig | ReproduceConfig)
    # Signals during the import of JAX and the initialization of the cluster are handled later.
    with preemption.caught() if trains else contextlib.nullcontext():
        try:
            _prepare()
        except KeyboardInterrupt:
            print(_INTERRUPTED, file=sys.stderr)
            sys.exit(130)
        with _exit_codes(config):
            if isinstance(config, DistributedConfig):
                _join(config)
            if trains:
                _stop_at_once_if_alone()
            with _shown_messages():
                command(*arguments)
            _flush()


def show(text: str) -> None:
    """Prints a text; its reader may close the pipe early, as in `--help | head`."""
    with contextlib.suppress(BrokenPipeError):
        try:
            print(text)
        finally:
            _flush()


class _StandardOutput(logging.Handler):
    """Prints the messages of the library as they are; an error of the stream ends the command, as in `print`."""

    def emit(self, record):
        print(record.getMessage(), flush=True)


@contextlib.contextmanager
def _shown_messages():
    """Shows the messages that the modules of the library log, of all levels from INFO."""
    library, handler = logging.getLogger("llm2vec_gen_jax"), _StandardOutput()
    before = library.level, library.propagate
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    library.propagate = False  # to handlers of other packages, which would repeat them
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.level, library.propagate = before


def _flush():
    """Flushes standard output. If it is closed, replaces it, because Python would report the error again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _open_streams():
    """Replaces closed standard streams by /dev/null: the next file opened would get their descriptors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _stop_at_once_if_alone():
    import jax

    if not jax.distributed.is_initialized():  # the processes of a run stop at the same step
        preemption.stop_at_once()


def load_embedder(path: str, config: Any) -> "LLM2VecGen":
    """`api.load_configured_model`, which imports JAX."""
    from llm2vec_gen_jax.api import load_configured_model

    return load_configured_model(path, config)


def lock_outputs(command: Callable[[str, Any], None], *keys: str) -> Callable[[str, Any], None]:
    """Returns command(model, config) with locks on the paths of `keys` (default "output") in its config.

    It raises InputError if another process holds a lock, OSError if an output was removed before the command finished.
    """

    @functools.wraps(command)
    def locked_command(path, config):
        outputs = {key: target for key in keys or ("output",) if (target := getattr(config, key))}
        with contextlib.ExitStack() as stack:
            for key, target in {os.path.realpath(path): (key, path) for key, path in outputs.items()}.values():
                stack.enter_context(locks.locked(target, key))
            command(path, config)
            require_written(*outputs.values())

    return locked_command


def _parse(schema, positional, argv):
    """Returns (arguments of the command, config that determines how it runs)."""
    overrides = [argument for argument in argv if "=" in argument and not os.path.exists(argument)]  # a path may have =
    paths = [argument for argument in argv if argument not in overrides]
    if any(argument.startswith("-") and not os.path.exists(argument) for argument in argv):
        raise InputError(f"settings are written key=value, without dashes: {options.suggest(schema, argv)}")
    if len(paths) > 1 and positional != "CONFIG...":
        raise InputError(f"cannot read {' '.join(map(repr, paths))}: expected one {positional} and key=value pairs")
    files = [file for path in paths for file in _expand(path)] if positional != "MODEL" else []
    configs = [options.load(schema, file, overrides) for file in files or [None]]
    if positional == "CONFIG":
        return (configs[0],), configs[0]
    if not paths:
        expected = {"MODEL": "a model directory or hub id", "CONFIG...": "one or more YAML files"}[positional]
        raise InputError(f"{positional} is missing: pass {expected} first")
    return (os.path.expanduser(paths[0]), configs[0]) if positional == "MODEL" else (files, configs), configs[0]


def _expand(path):
    """Returns the shipped files that match configs/NAME*.yaml, a pattern that the shell could not expand."""
    if not (path.startswith("configs/") and "*" in path) or os.path.exists(path):
        return [path]
    return sorted(str(file.relative_to(SHIPPED)) for file in SHIPPED.glob(path)) or [path]


def _join(config):
    """Joins the processes of a run, and verifies that they have the same code and config."""
    import jax

    from llm2vec_gen_jax.parallel import processes

    static = hasattr(config, "shard")  # static shards: no synchronization needed
    processes.initialize(config, not static)
    values = {key: value for key, value in options.to_dict(config).items() if key not in ("process_id", *HUB_KEYS)}
    processes.assert_equal_across_processes({"code": processes.code_version(), "config": values})
    if not static and processes.stop_requested():
        raise preemption.Stopped("stopped on request, before starting")
    if static and jax.process_count() > 1:
        if config.shard.count > 1:
            raise InputError(
                f"shard.count={config.shard.count}: joined processes get one shard each. Remove shard.count"
            )
        config.shard = ShardConfig(jax.process_index(), jax.process_count())


@contextlib.contextmanager
def _exit_codes(config):
    """Maps exceptions to an error line and exit code, without waiting for other processes of the run."""
    import jax

    from llm2vec_gen_jax.parallel import processes

    def end(line, code):
        print(line, file=sys.stderr)
        with contextlib.suppress(OSError):
            _flush()
        processes.exit_process(code)

    try:
        yield
    except InputError as error:
        end(f"error: {options.with_key(str(error), config)}", processes.BAD_INPUT)
    except FloatingPointError as error:
        end(f"error: {error}", 1)
    except preemption.Stopped as error:  # all processes exit together
        print(f"{error}. Repeat the command to resume", file=sys.stderr)
        sys.exit(processes.PREEMPTED)
    except processes.PeerMissing as error:
        end(f"error: {error}", processes.PEER_FAILED)
    except BrokenPipeError as error:
        end(f"error: {error.filename or 'standard output'}: closed by its reader", 1)
    except OSError as error:
        if error.strerror is None:
            raise
        codes = dict.fromkeys(_PATH_ERRORS, processes.BAD_INPUT) | dict.fromkeys(_DISK_ERRORS, processes.IO_FAILED)
        end(f"error: {_os_error_line(error)}", codes.get(error.errno, 1))
    except KeyboardInterrupt:
        end(_INTERRUPTED, 130)
    except Exception as error:
        if problem := devices.problem_of(error):
            end(f"error: {problem}", processes.BAD_INPUT)
        if not jax.distributed.is_initialized():
            raise
        if processes.is_loss_of_peer(error):
            end(f"error: {first_line(error)}. See the output of the process that ended first", processes.PEER_FAILED)
        traceback.print_exc()
        processes.exit_process(1)


def _os_error_line(error):
    """Returns the message for an OSError."""
    return one_line(f"{error.filename or 'writing'}: {error.strerror or error}")


def _prepare():
    devices.prepare()
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save
    import jax

    jax.config.update("jax_enable_x64", False)  # the environment could enable it; dtypes are settings here
    # Reuse programs compiled by earlier runs.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def _help(schema, positional):
    name, about_command, *more = _about(schema)
    argument = "[CONFIG]" if positional == "CONFIG" else positional
    about = {
        "MODEL": "MODEL is a model directory or hub id.",
        "CONFIG": "CONFIG is a YAML file (see configs/); key=value pairs override it.",
        "CONFIG...": "Each CONFIG is a YAML file (see configs/ablations/); key=value pairs override all of them.",
    }[positional]
    width = terminal.terminal_width()
    paragraphs = [f"usage: {command_prefix()}{name} {argument} [key=value ...]", f"{about_command} {about}", *more]
    return "\n\n".join(
        [
            *("\n".join(terminal.wrap(paragraph, width)) for paragraph in paragraphs),
            help.example_text(f"{command_prefix()}{name}", schema.EXAMPLE, width),
            help.help_text(schema, width),
        ]
    )


def _actions_help(about, schemas):
    width = terminal.terminal_width()
    lines = [
        f"usage: {command_prefix()}{_about(next(iter(schemas.values())))[0].split()[0]} ACTION MODEL [key=value ...]",
        "",
    ]
    lines += [*terminal.wrap(about.splitlines()[0], width), "", "actions (ACTION --help lists the keys):"]
    for name, schema in schemas.items():
        lines += terminal.wrap(_about(schema)[1], width, " " * 16, f"  {name:<14}")
    return "\n".join(lines)


def _about(schema):
    """Returns (name of the command, what it does, further paragraphs) from the docstring of a schema."""
    first, *more = inspect.cleandoc(schema.__doc__).split("\n\n")
    call, about = " ".join(first.split()).split("`: ", 1)
    name = call.removeprefix("`python -m launch.").removesuffix(" MODEL")
    return name, about[0].upper() + about[1:], *(" ".join(paragraph.split()) for paragraph in more)
