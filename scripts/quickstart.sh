#!/usr/bin/env bash
# From a fresh clone to captions in a style of one's own, in minutes, on pictures and a tiny base that are here.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/quickstart.py" "$@"
