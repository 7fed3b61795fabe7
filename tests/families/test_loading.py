"""A model of another family is refused before its weights load, and its own scripts are named."""

import json

import pytest

from caption_train.errors import UsageError
from caption_train.families import FAMILIES, get_family
from caption_train.families.loading import OTHER_SCRIPTS, OWN_SCRIPTS, name_scripts


def test_the_scripts_named_are_the_families():
    named = {*OWN_SCRIPTS.values(), OTHER_SCRIPTS}
    families = map(get_family, FAMILIES)
    assert named == {(family.training_script, family.inference_script) for family in families}


OTHERS = [
    (family, kind)
    for family, own in (("blip", "blip"), ("florence", "florence2"), ("moondream", "moondream1"))
    for kind in (*OWN_SCRIPTS, "llava")
    if kind != own
]


@pytest.mark.parametrize(("family", "kind"), OTHERS)
def test_a_model_of_another_family_names_its_own_scripts(family, kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        get_family(family).load(str(tmp_path))
    assert str(caught.value).endswith(name_scripts(kind))
