"""`python -m caption_train VERB …`: the same as the command `caption-train` and the scripts."""

import sys

from caption_train.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
