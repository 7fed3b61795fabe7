"""What `--preset` offers: prompts by name, for families that read a sentence. A plain table."""

PRESETS = {
    "descriptive": "Describe this image in detail.",
    "short": "Describe this image in one short sentence.",
    "tags": "List tags for this image, separated by commas: subject, attributes, setting, style, lighting.",
    "sd_prompt": "Write a text-to-image prompt that would produce this image. Answer with the prompt alone.",
    "alt_text": "Write alternative text for this image, for people who cannot see it, in 125 characters.",
}
"""Values of `--preset` → the prompt it stands for."""
