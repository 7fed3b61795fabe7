"""What tests of training share: captioned pictures, and the options of a small run on them."""

import pytest

from tests.fixtures.runs import make_options, write_pairs


@pytest.fixture(scope="module")
def pairs(request, tmp_path_factory):
    """A folder of captioned pictures: ten, or as many as the module's PAIRS says."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), getattr(request.module, "PAIRS", 10))


@pytest.fixture
def make(request, base, pairs, tmp_path):
    """`make("out", epochs=2)`: options of a run that writes tmp_path/out; a module's RUN is its defaults."""

    def make(output="out", **changes):
        settings = {**getattr(request.module, "RUN", {}), **changes}
        return make_options("blip", base, pairs, tmp_path / output, **settings)

    return make
