"""Has the model suggest captions, in a thread of its own that loads it when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

from caption_train.adapters.record import Base, read_adapter, resolve_base
from caption_train.config.captioning import CaptionOptions
from caption_train.config.reviewing import ReviewOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import FAMILIES, get_family
from caption_train.reviewing.items import Item, Library

if TYPE_CHECKING:
    from caption_train.families.base import Family

MOST_WAITING = 32
"""Suggestions that may be asked for at once; a page asks for one."""
MOST_TEMPERATURE, MOST_BEAMS, MOST_PROMPT = 10, 64, 20_000


def find_family(options: ReviewOptions) -> Family:
    """Return the family of the model: what `--family` says, else the adapter.

    Raises:
        UsageError: neither says a family that there is.
    """
    name = options.family
    if name is None and options.peft_model:
        name = read_adapter(options.peft_model).family
    if name not in FAMILIES:
        said = f"--family {name}: there is no such family" if name else "--family is required with this model"
        raise UsageError(f"{said}; the families are {', '.join(FAMILIES)}")
    return get_family(name)


@dataclass(frozen=True)
class Wish:
    """How a suggestion is made. try_number: counts the samples of an image, which are all different."""

    prompt: str
    temperature: float = 0.0
    beams: int | None = None
    try_number: int = 0

    def check(self) -> None:
        """Raise UsageError for what no suggestion is made with."""
        if not 0 <= self.temperature <= MOST_TEMPERATURE:  # which NaN is not either
            raise UsageError(f"temperature: give a number from 0 to {MOST_TEMPERATURE}")
        if self.beams is not None and not 1 <= self.beams <= MOST_BEAMS:
            raise UsageError(f"beams: give a whole number from 1 to {MOST_BEAMS}")
        if len(self.prompt) > MOST_PROMPT:
            raise UsageError(f"prompt: give at most {MOST_PROMPT:,} characters")


class Suggester:
    """A model in one worker thread.

    Args:
        options: name the model.
        family: its family.
        library: the images.
    """

    def __init__(self, options: ReviewOptions, family: Family, library: Library) -> None:
        adapter = read_adapter(options.peft_model) if options.peft_model else None
        self.family = family
        self.base: Base = resolve_base(
            family,
            options.base_model,
            options.revision,
            options.prompt,
            adapter,
            settings=dict.fromkeys(family.settings),
        )
        self._options = options
        self._library = library
        self._jobs: Queue[tuple[Future, Callable[[], Any]]] = Queue(MOST_WAITING)
        self._worker: Thread | None = None
        self._loaded: tuple[Any, Any] | None = None
        self._counts: dict[str, int] = {}

    @property
    def adapter(self) -> Path | None:
        """The adapter's folder, as it was named."""
        return self._options.peft_model

    @property
    def is_loaded(self) -> bool:
        """Whether the model was loaded already, so that a suggestion takes no longer than it must."""
        return self._loaded is not None

    def suggest(self, item: Item, wish: Wish) -> Future[str]:
        """Ask for a suggestion.

        Raises:
            CaptionTrainError: too many are waiting; UsageError: it cannot be made so.
        """
        wish.check()
        return self._submit(lambda: self._suggest(item, wish))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens of this model captions have."""
        return self._submit(lambda: self._count_tokens(texts)).result()

    def _submit(self, job: Callable[[], Any]) -> Future:
        future: Future = Future()
        try:
            self._jobs.put_nowait((future, job))
        except Full:
            raise CaptionTrainError(
                f"{MOST_WAITING} suggestions are waiting already: try again later"
            ) from None
        if self._worker is None:
            # A daemon, so that Ctrl-C need not wait until a model is loaded.
            self._worker = Thread(target=self._work, name="suggestions", daemon=True)
            self._worker.start()
        return future

    def _work(self) -> None:
        while True:
            future, job = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue  # whoever asked has gone away
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)

    def _make_options(self, wish: Wish) -> CaptionOptions:
        options = self._options
        return CaptionOptions(
            images=[str(options.images)],
            base_model=options.base_model,
            peft_model=options.peft_model,
            revision=options.revision,
            device=options.device,
            dtype=options.dtype,
            quantize=options.quantize,
            max_token_length=options.max_token_length,
            prompt=wish.prompt,
            beams=wish.beams,
            temperature=wish.temperature,
            seed=(options.seed + wish.try_number) % 2**31,
            batch_size=1,
            num_workers=0,
            sources=options.sources,
        )

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from caption_train.captioning.generate import load_captioner
            from caption_train.system.devices import choose_device

            device = choose_device(self._options.device)
            options = self._make_options(Wish(self.base.prompt))
            self._loaded = load_captioner(self.family, self.base, options, device)
        return self._loaded

    def _suggest(self, item: Item, wish: Wish) -> str:
        from caption_train.captioning.generate import caption_images, make_generation
        from caption_train.captioning.plan import Unreadable

        options = self._make_options(wish)
        if problems := options.check():
            raise UsageError("; ".join(problems))
        self.family.check_prompt(wish.prompt)
        model, processor = self._load()
        path = self._library.check(item.path)
        generation = make_generation(options, wish.prompt)
        result = next(iter(caption_images(self.family, model, processor, [path], generation, batch_size=1)))
        if isinstance(result, Unreadable):
            raise CaptionTrainError(result.reason)
        return result.generated.text

    def _count_tokens(self, texts: Sequence[str]) -> list[int]:
        _, processor = self._load()
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            raise UsageError(f"the tokens of {self.family.title} cannot be counted; count words")
        new = [text for text in dict.fromkeys(texts) if text not in self._counts]
        if new:
            rows = tokenizer(new, add_special_tokens=False)["input_ids"]
            self._counts |= {text: len(row) for text, row in zip(new, rows, strict=True)}
        return [self._counts[text] for text in texts]
