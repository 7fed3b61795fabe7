"""Asking a served model: an image and a prompt as a conversation of OpenAI's chat API."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from caption_train.families.vlm.images import MAX_PIXELS, fit_image

if TYPE_CHECKING:
    from PIL import Image


def write_conversation(image: Image.Image, prompt: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return messages with the image as a PNG in a data URL, no larger than `max_pixels`, or MAX_PIXELS.

    Image first, then the prompt, as in training; the server's chat template does the rest.
    """
    buffer = io.BytesIO()
    fit_image(image, settings.get("max_pixels") or MAX_PIXELS).save(buffer, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    system = settings.get("system_prompt")
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": content}]
