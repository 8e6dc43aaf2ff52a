"""The published PyTorch package in an environment of its own.

`python -m tests.parity.peer` makes it and prints its Python. It is kept in .cache/peer of the
checkout, or is that of $LLM2VEC_GEN_PEER_PYTHON.
"""

import os
import pathlib
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements-peer.txt"
WITHOUT_DEPENDENCIES = ("llm2vec-gen==0.1.3", "llm2vec==0.2.3")


def python():
    """Returns the Python of the peer's environment, made on the first call. Raises CalledProcessError without pip."""
    given = os.environ.get("LLM2VEC_GEN_PEER_PYTHON")
    if given:
        return given
    folder = ROOT / ".cache" / "peer"
    executable = folder / "bin" / "python"
    done = folder / "requirements.txt"  # written last, so that a half-made environment is made again
    wanted = REQUIREMENTS.read_text() + "\n".join(WITHOUT_DEPENDENCIES)
    if not done.exists() or done.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(executable), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True, capture_output=True, text=True)
        subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], check=True, capture_output=True, text=True)
        done.write_text(wanted)
    return str(executable)


if __name__ == "__main__":
    try:
        print(python())
    except subprocess.CalledProcessError as error:
        sys.exit(f"cannot make the peer's environment:\n{error.stderr}")
