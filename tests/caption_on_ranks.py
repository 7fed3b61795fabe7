"""One of several processes that caption a folder together; `test_processes.py` starts them with torchrun."""

import sys
from pathlib import Path

from fake_family import FakeFamily

from caption_train.captioning.job import caption_folder
from caption_train.cli.exit_codes import run
from caption_train.config.captioning import CaptionOptions


def main(images, output, *save):
    options = CaptionOptions(
        images=[images],
        output=Path(output) if output != "-" else None,
        save_captions=bool(save),
        num_workers=0,
        batch_size=2,
    )
    return caption_folder(options, FakeFamily())


if __name__ == "__main__":
    sys.exit(run(lambda: main(*sys.argv[1:])))
