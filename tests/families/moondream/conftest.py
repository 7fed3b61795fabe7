"""A small Moondream 2 and items to caption, which all tests of the family share."""

import pytest

from tests.fixtures.moondream import make_items, make_small_model


@pytest.fixture(scope="module")
def loaded():
    """A model with random weights and its processor."""
    return make_small_model()


@pytest.fixture
def items():
    """Captioned pictures of several sizes, as a collator gets them."""
    return make_items()
