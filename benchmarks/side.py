"""Shared parts of the benchmarks: options, alternating worker processes, tables."""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import read_json
from llm2vec_gen_jax.model import architecture
from llm2vec_gen_jax.parallel import chips
from tests.parity import peer

HERE = pathlib.Path(__file__).parent
SHAPES = HERE.parent / "configs" / "architectures"
NUM_TOKENS = 10  # compression tokens


def parse(
    doc: str,
    defaults: Mapping[str, Mapping[str, Any]],
    add: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
) -> argparse.Namespace:
    """Parses a benchmark's command line.

    defaults: {preset: {option: value}}. add(parser) adds the benchmark's own options.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(defaults), default="cpu", help="device and size")
    parser.add_argument("--model", nargs="+", help="names of shapes in configs/architectures")
    parser.add_argument("--architecture", nargs="+", default=[], help="config.json files of other shapes")
    parser.add_argument("--queries", help=".jsonl[.gz] with `question` keys, for real lengths")
    parser.add_argument("--batch-size", type=int, nargs="+", help="batch sizes")
    parser.add_argument("--rounds", type=int, help="number of rounds; medians are reported")
    parser.add_argument("--dtypes", nargs="+", help="float32, bfloat16")
    parser.add_argument("--no-peer", action="store_true", help="run only this package")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the published package")
    parser.add_argument("--together", action=argparse.BooleanOptionalAction, help="keep both packages on the device")
    parser.add_argument("--output", help=".jsonl file to which the rows are appended")
    add(parser)
    arguments = parser.parse_args()
    for name, value in defaults[arguments.preset].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.together is None:
        arguments.together = arguments.preset == "cpu"
    jax.config.update("jax_platforms", "cpu")  # leaves the accelerator to the workers
    return arguments


def run(main: Callable[[], Any]) -> None:
    """Runs a benchmark; InputError exits with its message."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")


def shapes(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], architecture.Architecture]]:
    """Yields (name, config.json as a dict, Architecture) of the selected models."""
    files = arguments.architecture or [SHAPES / f"{name}.json" for name in arguments.model]
    for path in map(pathlib.Path, files):
        if not path.exists():
            known = ", ".join(sorted(file.stem for file in SHAPES.glob("*.json")))
            raise InputError(f"{path}: no such file; known models: {known}")
        config = read_json(path)
        yield path.stem, config, architecture.from_hf_config(config, path)


class Side:
    """A worker process that executes and times commands.

    The worker receives the path of a JSON specification, prints one line of JSON when it is ready, and answers each
    line of JSON with another: at least seconds and peak_bytes, or error. alone: it has the device to itself and is
    restarted for every round. warmup: a command that is run first without being counted, and compiles everything.
    """

    def __init__(
        self,
        name: str,
        spec: dict[str, Any],
        warmup: dict[str, Any],
        arguments: argparse.Namespace,
        ours: bool = False,
    ) -> None:
        self.name, self.spec, self.warmup, self.ours = name, spec, warmup, ours
        self.alone, self.cpu = not arguments.together, arguments.preset == "cpu"
        self.process, self.failed = None, None
        self.compile_seconds, self.peak_bytes = 0.0, 0
        self.ready: dict[str, Any] = {}
        self.results: list[dict[str, Any]] = []
        self.folder = tempfile.TemporaryDirectory()

    def run(self, command: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the answer to a command, or None if it or an earlier one failed, with the reason in `failed`."""
        if self.failed:
            return None
        if self.process is None:
            self._start()
        answer = None if self.failed else self._ask(command)
        if self.alone or self.failed:
            self.quit()
        return answer

    def quit(self) -> None:
        """Ends the worker."""
        if self.process:
            self.process.stdin.close()
            self.process.wait()
            self.process = None

    def _start(self):
        env = dict(os.environ)
        if self.ours and self.cpu:
            env["JAX_PLATFORMS"] = "cpu"
        if self.ours and not self.alone:
            env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        path = pathlib.Path(self.folder.name) / "spec.json"
        path.write_text(json.dumps(self.spec | {"cache": self.folder.name if self.alone else None}))
        command = [sys.executable, "-m", "benchmarks.ours"] if self.ours else [peer.python(), str(HERE / "peer.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([*command, str(path)], env=env, **pipes)
        self.ready = self._answer() or self.ready
        if not self.failed:
            self._ask(self.warmup)

    def _ask(self, command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with {self.process.wait()}"}
        self.failed = answer.get("error")
        self.peak_bytes = max(self.peak_bytes, answer.get("peak_bytes", 0))
        # That of the first start: later ones use its cache.
        self.compile_seconds = max(self.compile_seconds, answer.get("compile_seconds", 0.0))
        return None if self.failed else answer


def take_turns(sides: Sequence[Side], rounds: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Runs rounds, lists of one command per side, so that a slow period of the machine affects all sides."""
    for number, commands in enumerate(rounds):
        turn = list(zip(sides, commands))
        for side, command in turn if number % 2 else turn[::-1]:
            if (answer := side.run(command)) is not None:
                side.results.append(answer)
    for side in sides:
        side.quit()


def of_peer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the part of a peer's specification that describes the machine."""
    return {"device": "cpu" if arguments.preset == "cpu" else "cuda", "threads": arguments.threads}


def peak_flops(sides: Sequence[Side]) -> tuple[float, str]:
    """Returns (peak FLOPs per second of the device, description of the source)."""
    ready = [side.ready for side in sides if side.ready]
    chip = next((chip for worker in ready if (chip := chips.chip_of(worker["device"]))), None)
    if chip:
        return chip.flops, "by its data sheet (dense bfloat16)"
    best = max((worker["matmul_flops"] for worker in ready), default=float("nan"))
    return best, "measured in this dtype: the best large matrix product timed in the processes"


def describe_peak(peak: tuple[float, str]) -> str:
    """Returns the description of a peak."""
    return f"the device's {peak[0] / 1e12:,.3f} TFLOP/s {peak[1]}"


def ratio(ours: Side, theirs: Side, more: float = 0.0) -> float | None:
    """Returns the speedup over the peer, the median over rounds; None if either failed.

    more: seconds that are added to every round of this package.
    """
    if ours.failed or theirs.failed:
        return None
    return statistics.median(b["seconds"] / (a["seconds"] + more) for a, b in zip(ours.results, theirs.results))


def speed_row(
    side: Side,
    works: Sequence[Mapping[str, float]],
    peak: tuple[float, str],
    ours: Side,
    hours_of: int | None = None,
) -> dict[str, Any]:
    """Returns the table row of a side. works: a dict of samples, tokens, computed_tokens and flops per round.

    peak: from peak_flops. ours: the side of this package. hours_of: samples of a run whose duration is reported.
    """
    row: dict[str, Any] = {"side": side.name}
    if side.failed:
        return row | {"error": side.failed}

    def rate(key):
        return statistics.median(work[key] / result["seconds"] for work, result in zip(works, side.results))

    row |= {
        "device": side.ready["device"],
        "rounds": len(works),
        "samples": sum(work["samples"] for work in works),
        "tokens": sum(work["tokens"] for work in works),
        "flops": sum(work["flops"] for work in works),
        "samples_per_second": rate("samples"),
        "tokens_per_second": rate("tokens"),
        "padding": 1 - sum(work["tokens"] for work in works) / sum(work["computed_tokens"] for work in works),
        "mfu": rate("flops") / peak[0],
        "peak_flops": peak[0],
        "peak_by": peak[1],
        "peak_bytes": side.peak_bytes,
        "compile_seconds": side.compile_seconds,
        "attention": side.ready.get("attention"),
        "seconds": [result["seconds"] for result in side.results],
    }
    if hours_of:
        row["hours"] = hours_of / row["samples_per_second"] / 3600
    return row | ({} if side is ours else {"ours_is": ratio(ours, side)})


SPEED = {
    "side": ("", "{}"),
    "samples_per_second": ("samples/s", "{:,.2f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "padding": ("padding", "{:.1%}"),
    "mfu": ("MFU", "{:.1%}"),
    "peak_bytes": ("peak GiB", lambda x: f"{x / 2**30:.2f}"),
    "compile_seconds": ("compile s", lambda x: f"{x:.0f}" if x else "-"),
}
OURS_IS = {"ours_is": ("ours is", "{:.2f}x")}


def show(
    title: str,
    columns: Mapping[str, tuple[str, Any]],
    rows: Sequence[dict[str, Any]],
    notes: Sequence[str],
    arguments: argparse.Namespace,
) -> None:
    """Prints a Markdown table and appends its rows to arguments.output. columns: {key: (header, format)}."""
    command = " ".join(["python -m", f"benchmarks.{pathlib.Path(sys.argv[0]).stem}", *sys.argv[1:]])
    host = f"{platform.machine()}, {os.cpu_count()} cores"
    date = datetime.date.today().isoformat()
    print(f"\n**{title}** ({date}, {host}), `{command}`\n")
    print("| " + " | ".join(header for header, _ in columns.values()) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = []
        for key, (_, form) in columns.items():
            value = row.get(key)
            cells.append("" if value is None else form(value) if callable(form) else form.format(value))
        if "error" in row:
            cells[1] = row["error"]
        print("| " + " | ".join(cells) + " |")
    print()
    for note in notes:
        print(f"- {note}")
    sys.stdout.flush()
    if arguments.output:
        with open(arguments.output, "a", encoding="utf-8") as file:
            for row in rows:
                run = {"date": date, "command": command, "host": host, "title": title}
                file.write(json.dumps(run | row, default=_plain) + "\n")


def _plain(value):
    """Converts numpy scalars for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(type(value))
