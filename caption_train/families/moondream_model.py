"""The lasting import path of the Moondream model: every saved Moondream LoRA names it as `parent_library`."""

from caption_train.families.moondream.model import MoondreamForConditionalGeneration, MoondreamPreTrainedModel

__all__ = ["MoondreamForConditionalGeneration", "MoondreamPreTrainedModel"]
