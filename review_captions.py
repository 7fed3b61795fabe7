#!/usr/bin/env python
"""Go through a folder of images and captions on a local page. See `--help`."""

import sys

from caption_train.cli.commands import review_main

if __name__ == "__main__":
    sys.exit(review_main())
