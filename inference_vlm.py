"""Caption images with any image-text-to-text model, with a LoRA or without."""

import sys

from caption_train.cli.commands import caption_main

if __name__ == "__main__":
    sys.exit(caption_main("vlm"))
