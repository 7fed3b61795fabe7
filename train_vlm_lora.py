"""Train a LoRA for any image-text-to-text model on a folder of captioned images."""

import sys

from caption_train.cli.commands import train_main

if __name__ == "__main__":
    sys.exit(train_main("vlm"))
