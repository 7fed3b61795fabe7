#!/usr/bin/env bash
# Lint and test, in .venv, which is made when missing. Arguments go to pytest: scripts/test.sh -k padding
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/run_tests.py" "$@"
