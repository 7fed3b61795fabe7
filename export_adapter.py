"""Write an adapter or a model in another form: merged into its base, or as older tools load it."""

import sys

from caption_train.cli.commands import export_main

if __name__ == "__main__":
    sys.exit(export_main())
