"""Loads the frozen base in 4 or 8 bits with bitsandbytes."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from caption_train.config.training import TrainOptions
from caption_train.system.devices import has_bfloat16

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = ("lm_head", "predictions.decoder")
"""Ends of the names of output heads. They share the embedding's weights, so they are not quantized."""

# bitsandbytes warns of a kernel for other processors as soon as peft or bitsandbytes is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# And, in 8 bits, of each product whose factors it rounds.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def make_quantization_config(
    options: TrainOptions,
    mixed_precision: str | None = None,
    parts: Mapping[str, str] | None = None,
    device: torch.device | None = None,
) -> "BitsAndBytesConfig | None":
    """Return what `from_pretrained` needs to quantize a base to train, or None without `--quantize`.

    Without mixed precision, a GPU that has bfloat16 computes in it: the weights are rounded anyway.

    Args:
        options: the options of the run.
        mixed_precision: the precision of matrix products, as the accelerator resolved it; by default the
            flag's.
        parts: the family's parts, for `--quantize_parts`.
        device: where the model will run.
    """
    if options.quantize is None:
        return None
    skipped = None
    if options.quantize_parts:
        # If any module to skip is named, transformers no longer skips the head by itself.
        kept = [pattern for name, pattern in parts.items() if name not in options.quantize_parts]
        skipped = [*kept, *HEADS]
    dtype = COMPUTE_DTYPES[mixed_precision or options.mixed_precision or "no"]
    if device is not None and device.type != "cpu" and dtype == torch.float32 and has_bfloat16(device):
        dtype = torch.bfloat16
    return quantization_config(options.quantize, dtype, skipped)


def quantization_config(
    kind: str, dtype: torch.dtype, skipped: Sequence[str] | None = None
) -> "BitsAndBytesConfig":
    """Return what `from_pretrained` needs to quantize.

    4 bits are NF4 with quantized constants (QLoRA, arXiv 2305.14314).

    Args:
        kind: "4bit" or "8bit".
        dtype: the precision of matrix products.
        skipped: modules that are not quantized, as transformers takes them; None leaves that to transformers.
    """
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=skipped,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def prepare_quantized(model: "PreTrainedModel") -> "PreTrainedModel":
    """Make a quantized model ready for adapters; return any other model as it is.

    All weights are frozen, and those that are not quantized (norms, embeddings, head) become float32.
    Gradients through checkpointed blocks are enabled where gradient checkpointing is. PEFT's usual hook on
    the input embeddings does not work for models that add to them in place.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return model
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512-BF16, evaluation would repack the weights in place. Later training would
            # fail, and later merging would be silently wrong.
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.register_forward_hook(_forget_input)
    return model


def _forget_input(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    """Drop the input that bitsandbytes keeps for the gradient of a weight, because here the weight is frozen.

    bitsandbytes keeps it as an attribute, where gradient checkpointing cannot free it, and so would save
    little.
    """
    node = output.grad_fn
    if hasattr(node, "A"):  # as trained on a CPU
        node.A = None
    elif hasattr(node, "tensors"):
        node.tensors = (None, None, None)
