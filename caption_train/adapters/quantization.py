"""Holding the frozen base in 4 or 8 bits with bitsandbytes."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from caption_train.config.training import TrainOptions

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = ("lm_head", "predictions.decoder")
"""Ends of the names of output heads, whose weights are the embedding's and stay in full precision."""

# Its warning about a kernel for another processor is printed on import of peft or bitsandbytes.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def make_quantization_config(
    options: TrainOptions, mixed_precision: str | None = None, parts: Mapping[str, str] | None = None
) -> "BitsAndBytesConfig | None":
    """Return what `from_pretrained` needs to quantize, or None without `--quantize`.

    4 bits are NF4 with the constants quantized again (QLoRA, arXiv 2305.14314), multiplied in the dtype of
    `mixed_precision` (as the accelerator resolved it; the flag's if not given). `parts` are the family's.
    """
    if options.quantize is None:
        return None
    from transformers import BitsAndBytesConfig

    skipped = None
    if options.quantize_parts:
        # Naming any module to skip makes transformers forget that it would have skipped the head.
        kept = [pattern for name, pattern in parts.items() if name not in options.quantize_parts]
        skipped = [*kept, *HEADS]
    if options.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=skipped,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=COMPUTE_DTYPES[mixed_precision or options.mixed_precision or "no"],
    )


def prepare_quantized(model: "PreTrainedModel") -> "PreTrainedModel":
    """Make a quantized model ready to carry adapters; a model that is not quantized comes back as it is.

    Everything is frozen and what is not quantized (norms, embeddings, the head) is float32. Gradients through
    checkpointed blocks are enabled where checkpointing is, not here: the usual hook on the input embeddings
    breaks models that add to them in place.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return model
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512-BF16 an evaluation would repack the weights for itself, in place; training
            # afterwards fails and merging afterwards is silently wrong.
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.register_forward_hook(_forget_input)
    return model


def _forget_input(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    """Drop the input that bitsandbytes keeps for the gradient of a weight, which is frozen here.

    It keeps it as an attribute, out of reach of gradient checkpointing, which then saves next to nothing.
    """
    node = output.grad_fn
    if hasattr(node, "A"):  # as trained on a CPU
        node.A = None
    elif hasattr(node, "tensors"):
        node.tensors = (None, None, None)
