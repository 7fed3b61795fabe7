"""A checkpoint's processor without torchvision: loaded from its parts, saved so that others can open it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.vlm.chat import (
    ChatFormat,
    list_special_tokens,
    render_prompt,
    starts_with_bos,
)
from caption_train.families.vlm.chat_format import find_chat_format
from caption_train.families.vlm.checkpoint import find_stop_ids, read_json
from caption_train.families.vlm.presets import find_prompts

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

PROCESSOR_FILE, IMAGE_FILE, VIDEO_FILE = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


@dataclass
class VlmProcessor:
    """The checkpoint's own processor, and how its conversations are written. Picklable, for data workers.

    inner: the processor, its `video_processor` and its audio parts None. files: the base's own settings of
    processor and video processor, by file name. input_names: what the model's forward takes.
    keeps_logits: whether it computes the loss from the last logits alone. own_prompts: those that the
    checkpoint's authors trained it with. system_prompt: said before every prompt. max_pixels: images are
    made no larger. settings: those in effect, by the name of their flag. rows: the tokens of images whose
    features are kept, by their size and prompt.
    """

    inner: ProcessorMixin
    chat: ChatFormat
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    input_names: frozenset[str] = frozenset()
    keeps_logits: bool = False
    own_prompts: dict[str, str] = field(default_factory=dict)
    system_prompt: str = ""
    max_pixels: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    rows: dict[tuple, Any] = field(default_factory=dict, repr=False, compare=False)
    _rendered: dict[tuple[str, str], str] = field(default_factory=dict, repr=False)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; its `model_max_length` is what the text model has positions for."""
        return self.inner.tokenizer

    @property
    def image_processor(self) -> Any:
        """The checkpoint's image processor, which works with PIL."""
        return self.inner.image_processor

    def render(self, prompt: str) -> str:
        """Return the conversation up to the answer, as text with one image token.

        Raises:
            UsageError: the prompt spells out a special token, or the template has no place for it.
        """
        key = prompt, self.system_prompt
        if key not in self._rendered:
            special = list_special_tokens(self.tokenizer)
            for flag, text in zip(("--prompt", "--system_prompt"), key, strict=True):
                if token := next((token for token in special if token in text), None):
                    raise UsageError(f"{flag}: {token} means something else to this model: leave it out")
            self._rendered[key] = render_prompt(self.inner, self.chat, *key)
        return self._rendered[key]

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Any]:
        """Return the model's inputs for B images and prompts, the text left-padded to [B, T].

        Pixels come as the model wants them: [B, C, H, W], or all images' patches in one flat tensor.
        """
        texts = [self.render(prompt) for prompt in prompts]
        encoded = self.inner(
            text=texts,
            images=[[image] for image in images],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=not starts_with_bos(self.tokenizer, texts[0]),
        )
        return {name: value for name, value in encoded.items() if name in self.input_names}

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the processor's files, as a plain AutoProcessor reads them, the video settings too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        template = self.inner.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if template:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        image = _public(self.image_processor)
        settings = _own_settings(self.inner)
        base = self.files.get(PROCESSOR_FILE, {})
        if "image_processor" in base or IMAGE_FILE not in self.files:
            settings["image_processor"] = image
        else:
            _write_json(folder / IMAGE_FILE, {**image, "processor_class": type(self.inner).__name__})
        _write_json(folder / PROCESSOR_FILE, base | settings)
        if VIDEO_FILE in self.files:
            _write_json(folder / VIDEO_FILE, self.files[VIDEO_FILE])


def load_processor(folder: Path, config: PretrainedConfig, model_class: type, model_id: str) -> VlmProcessor:
    """Load a checkpoint's processor from its folder and find out how its conversations are written.

    Args:
        folder: holds the checkpoint's SIDE_FILES.
        config: the model's.
        model_class: the model's, for what its forward takes.
        model_id: for messages.

    Raises:
        UsageError: a part is missing, or the chat template cannot be trained on; one line, no weights read.
    """
    inner = _build(folder, config, model_id)
    tokenizer = inner.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    text_config = config.get_text_config()
    if positions := getattr(text_config, "max_position_embeddings", None):
        tokenizer.model_max_length = positions
    files = {name: read_json(folder / name) for name in (PROCESSOR_FILE, IMAGE_FILE, VIDEO_FILE)}
    if not files[VIDEO_FILE] and "video_processor" not in files[PROCESSOR_FILE]:
        files[VIDEO_FILE] = _name_video_processor(inner, config)
    return VlmProcessor(
        inner,
        find_chat_format(inner, find_stop_ids(folder, config, tokenizer), model_id),
        {name: content for name, content in files.items() if content},
        frozenset(inspect.signature(model_class.forward).parameters) - {"labels"},
        can_keep_logits(model_class),
        find_prompts(model_id, config.model_type),
    )


def can_keep_logits(model_class: type) -> bool:
    """Tell whether a model takes `logits_to_keep`, and hands `shift_labels` on to transformers' loss.

    Where it only seemed to, labels and logits would differ in length, which is an error, not another loss.
    """
    forward = model_class.forward
    source = " ".join(inspect.getsource(inspect.unwrap(forward)).split())
    return "logits_to_keep" in inspect.signature(forward).parameters and bool(
        re.search(r"self\.loss_function\([^()]*(\([^()]*\)[^()]*)*\*\*\w+", source)
    )


def _build(folder: Path, config: PretrainedConfig, model_id: str) -> ProcessorMixin:
    """Make the checkpoint's processor from tokenizer and image processor; video and audio parts are None.

    AutoProcessor would make those too, and end where torchvision is not installed.
    """
    from transformers import AutoImageProcessor
    from transformers.models.auto.processing_auto import processor_class_from_name

    from caption_train.families.loading import explained

    name = _find_class_name(folder, config)
    processor_class = processor_class_from_name(name) if name else None
    if missing := getattr(processor_class, "_backends", None):
        # transformers puts a stand-in where a library is missing; whatever is asked of it is an ImportError.
        raise UsageError(
            f"--model_id {model_id}: {name} needs {', '.join(missing)}: pip install {' '.join(missing)}"
        )
    attributes = getattr(processor_class, "get_attributes", list)()
    if not {"tokenizer", "image_processor"} <= set(attributes):
        raise UsageError(f"--model_id {model_id}: its processor, {name}, does not take one image and a text")
    try:
        with explained(model_id):
            image_processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=False
            )
    except (ImportError, CaptionTrainError) as error:
        if "torchvision" not in str(error):
            raise
        kind = _name_image_processor(folder, config)
        raise UsageError(
            f"--model_id {model_id}: {kind} has no PIL version: pip install torchvision"
        ) from error
    with explained(model_id), _without_video(processor_class):
        parts = {
            attribute: processor_class._load_tokenizer_from_pretrained(attribute, str(folder))
            for attribute in attributes
            if "tokenizer" in attribute
        }
        parts |= {"image_processor": image_processor}
        settings, _ = processor_class.get_processor_dict(folder)
        processor = _put_together(processor_class, parts, settings)
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    return processor


def _put_together(processor_class: type, parts: dict[str, Any], settings: dict[str, Any]) -> ProcessorMixin:
    """Make a processor whose parts for video and audio are None.

    Some constructors, such as MiniCPM-V's, ask the part for videos for its settings. The image processor has
    settings of the same names, and stands in for it until the processor is made.
    """
    names = processor_class.get_attributes()
    try:
        return processor_class.from_args_and_dict([parts.get(name) for name in names], dict(settings))
    except AttributeError as error:
        if error.obj is not None or "video_processor" not in names:
            raise
    standing_in = parts | {"video_processor": parts["image_processor"]}
    processor: ProcessorMixin = processor_class.from_args_and_dict(
        [standing_in.get(name) for name in names], dict(settings)
    )
    processor.video_processor = None
    return processor


@contextmanager
def _without_video(processor_class: type) -> Iterator[None]:
    """Let a processor be made without the parts for video and audio, and without what those import."""
    module = import_module(processor_class.__module__)
    check = processor_class.check_argument_for_proper_class
    # SmolVLM asks for num2words, which writes out how many frames a video has.
    is_missing = getattr(module, "num2words", True) is None
    processor_class.check_argument_for_proper_class = lambda self, name, argument: (
        argument if argument is None or name == "video_processor" else check(self, name, argument)
    )
    if is_missing:
        module.num2words = str
    try:
        yield
    finally:
        if "check_argument_for_proper_class" in vars(processor_class):
            del processor_class.check_argument_for_proper_class
        if is_missing:
            module.num2words = None


def _find_class_name(folder: Path, config: PretrainedConfig) -> str | None:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    for name in (PROCESSOR_FILE, IMAGE_FILE, "tokenizer_config.json"):
        if said := read_json(folder / name).get("processor_class"):
            return said
    return PROCESSOR_MAPPING_NAMES.get(config.model_type)


def _name_image_processor(folder: Path, config: PretrainedConfig) -> str:
    settings = read_json(folder / PROCESSOR_FILE).get("image_processor") or read_json(folder / IMAGE_FILE)
    return settings.get("image_processor_type") or f"the image processor of {config.model_type}"


def _name_video_processor(inner: ProcessorMixin, config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings that name a processor's part for videos, {} where it has none.

    AutoProcessor finds its class by config.json, which an adapter's folder does not hold. Without torchvision
    transformers does not tell the class, so its name is read from the module that defines it.
    """
    import transformers

    if "video_processor" not in type(inner).get_attributes():
        return {}
    kind = config.model_type
    path = Path(transformers.__file__).parent / "models" / kind / f"video_processing_{kind}.py"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r"^class (\w+VideoProcessor)\(", text, re.MULTILINE)
    return {"video_processor_type": found.group(1)} if found else {}


def _own_settings(inner: ProcessorMixin) -> dict[str, Any]:
    """Return the processor's settings beside its parts' and its template's."""
    parts = set(type(inner).get_attributes()) | {"chat_template"}
    hidden = {name: inner.__dict__[name] for name in parts if name in inner.__dict__}
    for name in hidden:
        del inner.__dict__[name]
    try:
        return {name: value for name, value in inner.to_dict().items() if name not in parts}
    finally:
        inner.__dict__.update(hidden)


def _public(image_processor: Any) -> dict[str, Any]:
    """Return an image processor's settings under the name that every backend knows it by."""
    settings = json.loads(image_processor.to_json_string())
    return settings | {"image_processor_type": settings["image_processor_type"].removesuffix("Pil")}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(
        json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
