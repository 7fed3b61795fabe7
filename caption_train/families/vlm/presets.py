"""Prompts that some checkpoints' authors trained theirs with. A plain table."""

DEFAULT_PROMPT = "Describe this image."

CHECKPOINTS = {
    "joycaption": {
        "prompt": "Write a long descriptive caption for this image in a formal tone.",
        "system_prompt": "You are a helpful image captioner.",
    },
}
"""Part of a checkpoint's name, in lower case → the prompts its authors trained it with."""

MODEL_TYPES = {"paligemma": {"prompt": "caption en"}}
"""`model_type` → the prompts of a whole kind of checkpoints that know no others."""


def find_prompts(model_id: str, model_type: str) -> dict[str, str]:
    """Return a checkpoint's own `prompt` and `system_prompt`; the latter is "" for most."""
    name = model_id.replace("-", "").replace("_", "").lower()
    own = next((prompts for part, prompts in CHECKPOINTS.items() if part in name), {})
    return {"prompt": DEFAULT_PROMPT, "system_prompt": ""} | MODEL_TYPES.get(model_type, {}) | own
