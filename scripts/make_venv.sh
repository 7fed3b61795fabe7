#!/usr/bin/env bash
# Make .venv with requirements.txt installed; does nothing where it is there already. PYTHON: the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A copy of what was installed, written last: an interrupted installation is taken up again.
installed=.venv/requirements.txt
if cmp -s requirements.txt "$installed"; then
  exit 0
fi

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if ! is_new_enough .venv/bin/python; then
  for python in "${PYTHON:-}" python3.11 python3 python3.12 python3.13; do
    if [[ -n $python ]] && is_new_enough "$python"; then
      break
    fi
    python=
  done
  if [[ -z $python ]]; then
    echo "make_venv.sh: needs Python 3.11 or newer; set PYTHON to one" >&2
    exit 2
  fi
  echo "Making .venv with $python" >&2
  "$python" -m venv --clear .venv
fi

echo "Installing requirements.txt into .venv (some minutes the first time)" >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
cp requirements.txt "$installed"
