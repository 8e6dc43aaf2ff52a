"""Every reader of a file or folder, in a process of its own whose memory and time are limited.

`python -m tests.readers` takes lines of JSON: [name of a reader, path]; or a number of bytes, which the process may
have beyond what it has by then. It answers each with a line: "read", "refused: MESSAGE", or what else was raised.
"""

import contextlib
import json
import os
import pathlib
import queue
import resource
import subprocess
import sys
import threading
import traceback

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 30  # on a busy machine; a reader takes a fraction of one


def readers():
    """Returns {name: a function of a path that reads all of what is there}."""
    from llm2vec_gen_jax import config
    from llm2vec_gen_jax.common import files, jsonl
    from llm2vec_gen_jax.config import options
    from llm2vec_gen_jax.data import records, texts
    from llm2vec_gen_jax.data.texts import Corpus
    from llm2vec_gen_jax.evaluation import instructions, tasks
    from llm2vec_gen_jax.formats import peft, published, torchzip, weights
    from llm2vec_gen_jax.inference import shards
    from llm2vec_gen_jax.model.execution import Execution
    from llm2vec_gen_jax.pretrained import model_directory
    from llm2vec_gen_jax.pretrained.backbone import open_checkpoint
    from llm2vec_gen_jax.training import metrics
    from tests.conftest import one_device_mesh

    def backbone(path):
        opened, source = open_checkpoint(path, Execution(one_device_mesh()))
        weights.load(source, opened.architecture, one_device_mesh(), np.dtype("float32"))
        opened.tokenizer.encode(["a text", "<|im_end|>"], 20)

    def adapter(path):
        folder = pathlib.Path(path)
        found = peft.check(peft.read_json(folder / "adapter_config.json"), path)
        opened, _ = open_checkpoint(str(folder.parent / "backbone"), Execution(one_device_mesh()))
        peft.read(peft._load(folder / "adapter_model.safetensors"), found, opened.architecture, folder)

    def corpus(path):
        Corpus(path).count()
        list(Corpus(path).read())
        if not path.endswith(".txt"):
            list(Corpus(path, id_field="id").read())

    def run(path):
        with jsonl.JsonlAppender(pathlib.Path(path) / "rows.jsonl", {"a": 1}) as appender:
            return appender.rows

    return {
        "head": torchzip.read,
        "model": lambda path: (model_directory.read_model_directory(path), published.read_prompts(path)),
        "backbone": backbone,
        "adapter": adapter,
        "corpus": corpus,
        "records": lambda path: records.read_records(path, ("question", "answer")),
        "texts": lambda path: texts.read_texts(path, "text"),
        "task": tasks.read,
        "vectors": lambda path: (shards.load_embeddings(path, verify=True), shards.load_embeddings(path)),
        "array": lambda path: files.read_array(path, "soft_prompts").sum(),
        "config": lambda path: options.load(config.TrainConfig, path),
        "instructions": instructions.read,
        "metrics": lambda path: metrics.read_metrics(pathlib.Path(path)),
        "run": run,
    }


def main():
    from llm2vec_gen_jax.common.errors import InputError

    known = readers()
    for line in sys.stdin:
        message = json.loads(line)
        if isinstance(message, int):
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + message
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            answer = "limited"
        else:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    known[message[0]](message[1])
                answer = "read"
            except InputError as error:
                answer = f"refused: {error}"
            except BaseException:
                answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)


class Reader:
    """The process, and another after one that took too long."""

    def __init__(self, warm, memory=1 << 30):
        """warm: [(name, path)] of sound files, each read once before the memory is limited to as many bytes more."""
        self.warm, self.memory, self.process = warm, memory, None

    def start(self):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2", "XLA_FLAGS": ""}
        command = [sys.executable, "-m", "tests.helpers.readers"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes)
        self.answers = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process, self.answers), daemon=True).start()
        for name, path in self.warm:
            answer = self.ask([name, str(path)], 300)
            assert answer == "read", (name, path, answer)
        assert self.ask(self.memory) == "limited"

    @staticmethod
    def _listen(process, answers):
        for line in process.stdout:
            answers.put(json.loads(line))
        answers.put("the process ended")

    def ready(self):
        """Starts the process where none runs."""
        if self.process is None or self.process.poll() is not None:
            self.start()

    def read(self, name, path):
        """Returns the answer to a reader's name and a path."""
        return self.ask([name, str(path)])

    def ask(self, message, seconds=SECONDS):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        try:
            return self.answers.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            return f"no answer within {seconds} s"

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


if __name__ == "__main__":
    main()
