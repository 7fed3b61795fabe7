"""Caption images with BLIP, with or without a LoRA."""

import sys

from caption_train.cli.commands import caption_main

if __name__ == "__main__":
    sys.exit(caption_main("blip"))
