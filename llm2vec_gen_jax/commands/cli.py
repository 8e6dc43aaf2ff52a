"""What every command does first and last: arguments, compilation cache, errors to exit codes."""

import contextlib
import errno
import functools
import logging
import os
import sys
import textwrap
import traceback

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError, first_line, nearest, one_line
from llm2vec_gen_jax.common.files import SHIPPED, require_written
from llm2vec_gen_jax.config import DistributedConfig, ReproduceConfig, ShardConfig, TrackingConfig, options
from llm2vec_gen_jax.parallel import devices, preemption
from llm2vec_gen_jax.pretrained.default_backbone import cache_folder

# What the system says of a path that cannot be what a command was told to read or write; a repeat changes nothing.
_OF_PATHS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST),
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
)
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_INTERRUPTED = "\ninterrupted; nothing is half written, repeat the command to go on"


def run_one_of(actions):
    """`python -m launch.NAME ACTION MODEL [key=value ...]`. actions: {name: (schema, command(model, config))}."""
    action, *words = sys.argv[1:] or ["--help"]
    if action in actions:
        run(*actions[action], positional="MODEL", words=words)
    elif action in ("-h", "--help"):
        show("\n\n".join(_help(schema, "MODEL") for schema, _ in actions.values()))
    else:
        print(f"error: unknown action {action!r}{nearest(action, actions)}", file=sys.stderr)
        sys.exit(2)


def run(schema, command, positional="CONFIG", words=None):
    """Parses the command line into `schema` and calls command(config); command(model, config) for a MODEL;
    command(files, configs) for CONFIG... (one config per file; key=value pairs override each).

    words: what follows the command's name, default sys.argv.
    Exit codes: 0 done, 1 failed, 2 bad input (the message says what and how to mend it), 3 stopped by SIGTERM or
    Ctrl-C and saved, 74 could not write, 75 another process of the run ended, 76 no progress, 130 interrupted.
    """
    _open_streams()
    words = sys.argv[1:] if words is None else words
    if any(word in ("-h", "--help") for word in words):
        show(_help(schema, positional))
        return
    try:
        arguments, config = _read(schema, positional, words)
    except (InputError, OSError) as error:
        print(f"error: {_of_system(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        sys.exit(2)
    trains = isinstance(config, TrackingConfig | ReproduceConfig)
    # What comes while JAX is imported and the processes find one another is kept for later.
    with preemption.caught() if trains else contextlib.nullcontext():
        try:
            _prepare()
        except KeyboardInterrupt:
            print(_INTERRUPTED, file=sys.stderr)
            sys.exit(130)
        with _exit_codes():
            if isinstance(config, DistributedConfig):
                _join(config)
            if trains:
                _stop_at_once_if_alone()
            command(*arguments)
            _flush()


def show(text):
    """Prints a text that may be cut off: `--help | head`."""
    with contextlib.suppress(BrokenPipeError):
        print(text)
        _flush()


def _flush():
    """Flushes standard output. Where it is closed, Python would report that again as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _open_streams():
    """Opens /dev/null in place of a standard stream that is closed: its number would go to the next file opened."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _stop_at_once_if_alone():
    import jax

    if not jax.distributed.is_initialized():  # processes of one run stop at one step
        preemption.stop_at_once()


def alone(command, *keys):
    """Returns command(model, config), made the only process that writes the paths of `keys` (default "output").

    Raises InputError where another one does, OSError where a path was removed before the command's end.
    """

    @functools.wraps(command)
    def run_alone(path, config):
        outputs = {key: target for key in keys or ("output",) if (target := getattr(config, key))}
        with contextlib.ExitStack() as stack:
            for key, target in {os.path.realpath(path): (key, path) for key, path in outputs.items()}.values():
                stack.enter_context(locks.locked(target, key))
            command(path, config)
            require_written(*outputs.values())

    return run_alone


def _read(schema, positional, words):
    """Returns (the arguments of the command, the config that says how it runs)."""
    paired = [word for word in words if "=" in word and not os.path.exists(word)]  # a path may hold a =
    free = [word for word in words if word not in paired]
    if (len(free) > 1 and positional != "CONFIG...") or any(word.startswith("-") for word in free):
        raise InputError(f"cannot read {' '.join(map(repr, free))}: expected one {positional} and key=value pairs")
    files = [file for word in free for file in _matching(word)] if positional != "MODEL" else []
    configs = [options.load(schema, file, paired) for file in files or [None]]
    if positional == "CONFIG":
        return (configs[0],), configs[0]
    if not free:
        which = {
            "MODEL": "model? Give a model directory or hub id",
            "CONFIG...": "configs? Give one or more YAML files",
        }
        raise InputError(f"which {which[positional]} first")
    return (os.path.expanduser(free[0]), configs[0]) if positional == "MODEL" else (files, configs), configs[0]


def _matching(word):
    """Returns the shipped files of a pattern that the shell left as it is, having found none: configs/NAME*.yaml."""
    if not (word.startswith("configs/") and "*" in word) or os.path.exists(word):
        return [word]
    return sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.glob(word)) or [word]


def _join(config):
    """Joins the processes of the run that a DistributedConfig describes, and checks that they are of one run."""
    import jax

    from llm2vec_gen_jax.parallel import processes

    shared = hasattr(config, "shard")  # work that is split once and for all: nobody waits for anybody
    processes.initialize(config, not shared)
    values = {key: value for key, value in options.to_dict(config).items() if key != "process_id"}
    processes.assert_equal_across_processes({"code": processes.code_version(), "config": values})
    if not shared and processes.stop_requested():
        raise preemption.Stopped("stopped as asked, before anything was begun")
    if shared and jax.process_count() > 1:
        if config.shard.count > 1:
            raise InputError(f"shard.count={config.shard.count}: joined processes take a share each; leave it out")
        config.shard = ShardConfig(jax.process_index(), jax.process_count())


@contextlib.contextmanager
def _exit_codes():
    """Ends the process with a line and a code that name what was raised. In a run of several processes none waits."""
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
        end(f"error: {error}", processes.BAD_INPUT)
    except FloatingPointError as error:
        end(f"error: {error}", 1)
    except preemption.Stopped as error:  # all processes end together
        print(f"{error}. Repeat the command to go on", file=sys.stderr)
        sys.exit(processes.PREEMPTED)
    except processes.PeerMissing as error:
        end(f"error: {error}", processes.PEER_FAILED)
    except BrokenPipeError as error:
        end(f"error: {error.filename or 'standard output'}: closed by who reads it", 1)
    except OSError as error:
        if error.strerror is None:
            raise
        codes = dict.fromkeys(_OF_PATHS, processes.BAD_INPUT) | dict.fromkeys(_OF_THE_DISK, processes.IO_FAILED)
        end(f"error: {_of_system(error)}", codes.get(error.errno, 1))
    except KeyboardInterrupt:
        end(_INTERRUPTED, 130)
    except Exception as error:
        if problem := devices.problem_of(error):
            end(f"error: {problem}", processes.BAD_INPUT)
        if not jax.distributed.is_initialized():
            raise
        if processes.is_loss_of_peer(error):
            end(
                f"error: {first_line(error)}. If another process ended, what it printed says why", processes.PEER_FAILED
            )
        traceback.print_exc()
        processes.exit_process(1)


def _of_system(error):
    """Returns the line that an OSError becomes."""
    return one_line(f"{error.filename or 'writing'}: {error.strerror or error}")


def _prepare():
    devices.prepare()
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save
    import jax

    jax.config.update("jax_enable_x64", False)  # dtypes are settings; nothing here takes 64 bits by default
    # Programs compiled by an earlier run are read back; set JAX_COMPILATION_CACHE_DIR to keep them elsewhere.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def _help(schema, positional):
    lines = textwrap.dedent(" " * 4 + schema.__doc__).strip().splitlines()
    start = "llm2vec-gen " if sys.argv[0].startswith("llm2vec-gen ") else "python -m launch."
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
            f"usage: {start}{name} {first} [key=value ...]",
            "",
            about_command[0].upper() + about_command[1:],
            about,
            *lines[1:],
            "",
            "keys and their defaults:",
            options.help_text(schema),
        ]
    )
