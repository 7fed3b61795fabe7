#!/usr/bin/env bash
# Lint and test, in .venv, which is made when missing. Arguments go to pytest: scripts/test.sh -k padding
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/make_venv.sh

# Nothing is asked of a hub or a tracker, and a result never depends on how many cores there are.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest "$@"
