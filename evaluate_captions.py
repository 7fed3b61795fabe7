"""Caption a dataset with a base and its LoRAs, score the captions, and write a report to look at."""

import sys

from caption_train.cli.commands import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main())
