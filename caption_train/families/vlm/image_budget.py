"""`--max_pixels`: how large an image may be, set where each kind of image processor has its own bound."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from caption_train.families.vlm.images import MAX_PIXELS

if TYPE_CHECKING:
    from caption_train.families.vlm.processor import VlmProcessor

EXAMPLE = (640, 480)
"""A size that people know, to say how many tokens it takes."""
ANY_PROMPT = "Describe."
"""A prompt to count with: some templates refuse an empty one."""


def bound_images(processor: VlmProcessor, max_pixels: int | None) -> int | None:
    """Bound the images that `processor` reads; return the bound in effect, None for the checkpoint's own.

    Without `max_pixels` only those checkpoints are bounded, to MAX_PIXELS, that would take a photo of 12
    megapixels as it is; the rest keep their authors' tiles or fixed size.
    """
    image_processor = processor.image_processor
    size = dict(getattr(image_processor, "size", None) or {})
    if "image_grid_thw" in getattr(image_processor, "model_input_names", ()) and "longest_edge" in size:
        # Qwen's way: `longest_edge` and `shortest_edge` are areas.
        bound = max_pixels or min(MAX_PIXELS, size["longest_edge"])
        _set_size(image_processor, longest_edge=bound, shortest_edge=min(bound, size["shortest_edge"]))
        return bound
    if has_bound(image_processor, size):
        if max_pixels is not None:
            _lower(image_processor, size, max_pixels)
        return max_pixels
    if not _grows(processor):
        return None
    processor.max_pixels = max_pixels or MAX_PIXELS
    return processor.max_pixels


def has_bound(image_processor: Any, size: dict[str, Any]) -> bool:
    """Tell whether the processor cuts or resizes every image to a bound of its own that can be lowered."""
    names = ("max_patches", "max_image_tiles", "image_grid_pinpoints", "max_soft_tokens")
    if any(getattr(image_processor, name, None) for name in names):
        return True
    return size.get("longest_edge") is not None


def describe_budget(processor: VlmProcessor, bound: int | None) -> str:
    """Return a line on how many tokens images take: the largest there may be, and one of a common size."""
    # No larger than need be: what an image takes to read counts in a run's peak memory.
    size = dict(getattr(processor.image_processor, "size", None) or {})
    side = math.isqrt(bound) if bound else 2048 if has_bound(processor.image_processor, size) else 640
    most, example = count_image_tokens(processor, (side, side)), count_image_tokens(processor, EXAMPLE)
    what = f"at most {bound:,} pixels (--max_pixels)" if bound else "the size that the checkpoint sets"
    if most == example:
        return f"images: {what}, {most:,} token{'s' if most > 1 else ''} each"
    return f"images: {what}, up to {most:,} tokens; one of {EXAMPLE[0]}×{EXAMPLE[1]} takes {example:,}"


def count_image_tokens(processor: VlmProcessor, size: tuple[int, int]) -> int:
    """Return how many tokens stand for an image of this width and height."""
    from PIL import Image

    from caption_train.families.vlm.images import fit_image

    text = processor.render(ANY_PROMPT)
    image = fit_image(Image.new("RGB", size, "gray"), processor.max_pixels)
    plain = processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return processor([image], [ANY_PROMPT])["input_ids"].shape[1] - len(plain) + 1


def _grows(processor: VlmProcessor) -> bool:
    """Tell whether larger images take more tokens without end."""
    small, large = (count_image_tokens(processor, (side, side)) for side in (512, 1024))
    return large > 2 * small


def _lower(image_processor: Any, size: dict[str, Any], max_pixels: int) -> None:
    """Lower the bounds that an image processor has, none below its smallest."""
    if size.get("longest_edge"):
        tile = (getattr(image_processor, "max_image_size", None) or {}).get("longest_edge")
        side = math.isqrt(max_pixels)
        side = max(tile, side // tile * tile) if tile else side
        _set_size(image_processor, longest_edge=min(size["longest_edge"], side))
    tile = size.get("height", 0) * size.get("width", 0) or size.get("shortest_edge", 0) ** 2
    for name in ("max_patches", "max_image_tiles"):
        if tile and (most := getattr(image_processor, name, None)):
            least = getattr(image_processor, "min_patches", 1)
            setattr(image_processor, name, max(least, min(most, max_pixels // tile)))
    if grid := getattr(image_processor, "image_grid_pinpoints", None):
        fitting = [sides for sides in grid if math.prod(sides) <= max_pixels]
        image_processor.image_grid_pinpoints = fitting or [min(grid, key=math.prod)]
    if tokens := getattr(image_processor, "max_soft_tokens", None):
        pixels = (image_processor.patch_size * image_processor.pooling_kernel_size) ** 2
        choices = [n for n in (70, 140, 280, 560, 1120) if n <= tokens]
        fitting = [n for n in choices if n * pixels <= max_pixels]
        image_processor.max_soft_tokens = max(fitting, default=choices[0] if choices else tokens)


def _set_size(image_processor: Any, **edges: int) -> None:
    image_processor.size = type(image_processor.size)(**(dict(image_processor.size) | edges))
