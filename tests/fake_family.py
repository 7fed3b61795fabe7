"""A family without a model: its caption names the mean colour of the image and the prompt."""

import os

import torch

from caption_train.errors import UsageError
from caption_train.families.base import Generated

WORDS = ["dark", "grey", "bright", "white"]


class FakeModel(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, len(WORDS))
        self.batches = []

    @property
    def device(self):
        return self.weight.device

    @property
    def dtype(self):
        return self.weight.dtype


class FakeFamily:
    """Remembers what it loaded and how many images each batch had; `failure` is raised in the third batch."""

    name = "fake"
    title = "Fake"
    model_id = "fake/base"
    revision = None
    base_models = ("fake/base", "fake/large")
    default_prompt = "say"
    tasks = ()

    def __init__(self, failure=None):
        self.failure = failure
        self.loaded = []
        self.model = FakeModel()

    def load(self, model_id, *, revision=None, dtype=None, quantization_config=None):
        self.loaded.append((model_id, revision, dtype))
        return self.model, "processor"

    def encode(self, processor, images, prompts):
        if "die" in prompts[0]:
            os._exit(9)
        if "refused" in prompts[0]:
            raise UsageError("--prompt: refused")
        means = [torch.tensor(image.resize((1, 1)).getpixel((0, 0))) / 255 for image in images]
        return {"pixel_values": torch.stack(means), "prompts": list(prompts)}

    def generate(self, model, processor, batch, **settings):
        model.batches.append(len(batch["pixel_values"]))
        if self.failure and len(model.batches) == 3:
            raise self.failure
        values = batch["pixel_values"]
        logits = torch.stack([-(values.mean(1) - level / 3).abs() for level in range(len(WORDS))], dim=1)
        for processor in settings.get("logits_processor", []):
            logits = processor(None, logits)
        words = [WORDS[index] for index in logits.argmax(1)]
        finished = settings["max_new_tokens"] > 1
        texts = [f"{p} {w}".strip() for p, w in zip(batch["prompts"], words, strict=True)]
        return [Generated(text, list(text.encode()), finished) for text in texts]
