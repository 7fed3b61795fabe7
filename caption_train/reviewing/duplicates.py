"""Finds images that are in the folder several times, by their bytes."""

from collections import defaultdict
from collections.abc import Callable, Iterable

from caption_train.reviewing.items import Item
from caption_train.system.files import hash_file


def find_copies(items: Iterable[Item], is_stopped: Callable[[], bool] = lambda: False) -> dict[str, str]:
    """Return id → digest for the images whose bytes another image has too.

    Only files of the same size are read.

    Args:
        items: the images.
        is_stopped: asked before each file is read; where it says so, what was found so far is returned.
    """
    by_size: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        by_size[item.size].append(item)
    by_digest: dict[str, list[str]] = defaultdict(list)
    for item in (item for group in by_size.values() if len(group) > 1 for item in group):
        if is_stopped():
            break
        try:
            by_digest[hash_file(item.path)].append(item.id)
        except OSError:
            continue  # gone, or cannot be read: the page says so where it is shown
    return {id: digest for digest, ids in by_digest.items() if len(ids) > 1 for id in ids}
