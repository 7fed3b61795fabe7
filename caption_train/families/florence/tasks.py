"""Lists Florence-2's tasks, with the sentence that each task token stands for. No torch."""

from caption_train.errors import UsageError

TASKS = {
    "<CAPTION>": "What does the image describe?",
    "<DETAILED_CAPTION>": "Describe in detail what is shown in the image.",
    "<MORE_DETAILED_CAPTION>": "Describe with a paragraph what is shown in the image.",
    "<OD>": "Locate the objects with category name in the image.",
    "<DENSE_REGION_CAPTION>": "Locate the objects in the image, with their descriptions.",
    "<REGION_PROPOSAL>": "Locate the region proposals in the image.",
    "<OCR>": "What is the text in the image?",
    "<OCR_WITH_REGION>": "What is the text in the image, with regions?",
    "<CAPTION_TO_PHRASE_GROUNDING>": "Locate the phrases in the caption: {input}",
    "<REFERRING_EXPRESSION_SEGMENTATION>": "Locate {input} in the image with mask",
    "<REGION_TO_SEGMENTATION>": "What is the polygon mask of region {input}",
    "<OPEN_VOCABULARY_DETECTION>": "Locate {input} in the image.",
    "<REGION_TO_CATEGORY>": "What is the region {input}?",
    "<REGION_TO_DESCRIPTION>": "What does the region {input} describe?",
    "<REGION_TO_OCR>": "What text is in the region {input}?",
}
"""Task token → the sentence that Florence-2 was trained on; `{input}` is the rest of the prompt."""


def find_task(prompt: str) -> str | None:
    """Return the task token in a prompt, or None."""
    return next((token for token in TASKS if token in prompt), None)


def expand_prompt(prompt: str) -> str:
    """Return the sentence for a task token, with the rest of the prompt inserted; other text as it is.

    Spaces around the rest are kept, as in Microsoft's processor but unlike transformers'.

    >>> expand_prompt("<CAPTION>"), expand_prompt("<REGION_TO_OCR><loc_1>")
    ('What does the image describe?', 'What text is in the region <loc_1>?')
    >>> expand_prompt("Who is this?")
    'Who is this?'

    Raises:
        UsageError: the task needs a text and has none, or has one and takes none.
    """
    token = find_task(prompt)
    if token is None:
        return prompt
    rest = prompt.replace(token, "")
    if "{input}" not in TASKS[token] and rest:
        raise UsageError(f"--prompt: {token} takes no further text, but the prompt is {prompt!r}")
    if "{input}" in TASKS[token] and not rest.strip():
        raise UsageError(f"{token} needs a text or a region after it: --prompt '{token}a green car', say")
    return TASKS[token].replace("{input}", rest)


def check_prompt(prompt: str) -> None:
    """Raise UsageError for a prompt with the image token, or whose task lacks its text or takes none."""
    refuse_token("<image>", expand_prompt(prompt))


def refuse_token(token: str, text: str) -> None:
    """Raise UsageError if a text contains the token that stands for the image."""
    if token in text:
        raise UsageError(f"--prompt: {token} stands for the image and cannot be in a text")
