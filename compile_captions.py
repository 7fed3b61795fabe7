#!/usr/bin/env python
"""Compile image/caption pairs into a metadata.jsonl. See `--help`."""

import sys

from caption_train.cli.commands import compile_main

if __name__ == "__main__":
    sys.exit(compile_main())
