"""Lists the model families by name. A new family is a file here, a line in this dict and two scripts."""

from importlib import import_module

from caption_train.families.base import Family

FAMILIES = {
    "blip": "caption_train.families.blip:Blip",
    "florence": "caption_train.families.florence.family:Florence",
    "moondream": "caption_train.families.moondream.family:Moondream",
    "vlm": "caption_train.families.vlm.family:Vlm",
}


CONVERTIBLE = "florence"
"""The family of an exported model or adapter that does not name its own: the one whose old layout cannot."""


def get_family(name: str) -> Family:
    """Return the family object for `name`, importing its module only now."""
    module, _, class_name = FAMILIES[name].partition(":")
    return getattr(import_module(module), class_name)()


def name_script(family: str, *, trains: bool = False) -> str:
    """Return the file name of a family's script, or a description if the family is not known.

    Args:
        family: its name.
        trains: whether its training script is meant, not its inference script.
    """
    if family not in FAMILIES:
        return f"the {family} script"
    return get_family(family).training_script if trains else get_family(family).inference_script
