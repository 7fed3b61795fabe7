"""The permanent import path of the Moondream model: every saved Moondream LoRA has it as `parent_library`."""

from caption_train.families.moondream.model import MoondreamForConditionalGeneration, MoondreamPreTrainedModel

__all__ = ["MoondreamForConditionalGeneration", "MoondreamPreTrainedModel"]
