"""Looking for garbage is paused while very many objects are made."""

import gc
from contextlib import suppress

import pytest

from caption_train.system.memory import pausing_garbage_collection


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_is_looked_for_again_after_a_pause_only_where_it_was_before(was_enabled):
    try:
        gc.enable() if was_enabled else gc.disable()
        with suppress(ValueError), pausing_garbage_collection():
            assert not gc.isenabled()
            raise ValueError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
