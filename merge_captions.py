#!/usr/bin/env python
"""Put together what several jobs with --shard have captioned. See `--help`."""

import sys

from caption_train.cli.commands import merge_main

if __name__ == "__main__":
    sys.exit(merge_main())
