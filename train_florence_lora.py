"""Train a LoRA for Florence-2 on a folder of captioned images."""

import sys

from caption_train.cli.commands import train_main

if __name__ == "__main__":
    sys.exit(train_main("florence"))
