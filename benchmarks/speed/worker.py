"""The process of one side: `python -m benchmarks.speed.worker SPEC`, see sides.py.

SPEC is JSON: `row` (training or captioning), `side`, `family`, `base`, `data`, `device`, and what the row
needs.
"""

import json
import os
import sys


def main() -> None:
    """Do the work of a side, a piece each time it is told to."""
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.speed import captioning_sides, training_sides

    disable_progress_bar()
    spec = json.loads(sys.argv[1])
    if spec.get("cache"):
        os.environ["XDG_CACHE_HOME"] = spec["cache"]
    {"training": training_sides, "captioning": captioning_sides}[spec["row"]].work(spec)


if __name__ == "__main__":
    main()
