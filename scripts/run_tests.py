"""Lint and test in .venv, which is made when missing, for test.sh and test.ps1. Arguments go to pytest."""

import sys

from make_venv import PYTHON, environment, make_venv, run

# Nothing is asked of a hub or a tracker, and a result never depends on how many cores there are.
SETTINGS = {
    **{"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"},
    **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
}
# A file's tests share what takes long to make, so they go to one process; in the order of tests/conftest.py.
PROCESSES = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]


def main(arguments):
    make_venv()
    variables = environment(**SETTINGS)
    for command in (
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["pytest", *PROCESSES, *arguments],
    ):
        run([str(PYTHON), "-m", *command], variables)


if __name__ == "__main__":
    main(sys.argv[1:])
