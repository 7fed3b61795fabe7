"""The state of one review: captions, marks and history of a folder, and all that can be done to them."""

import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.reviewing.history import Batch, Edit, History, Mark
from caption_train.reviewing.items import Item, Library
from caption_train.reviewing.queries import Query, Replacement, count_tags, count_words, split_tags
from caption_train.reviewing.stores import Change, Outcome, Store
from caption_train.system.console import escape_unprintable

CountTokens = Callable[[Sequence[str]], list[int]]
KEPT_PREVIEWS = 8


class Review:
    """Captions, marks and history of a folder. Every method may be called from any thread.

    Args:
        library: the images.
        store: where the captions are.
        history: what was done to them so far.
        count_tokens: counts the tokens of captions; None where there is no model.
    """

    def __init__(
        self, library: Library, store: Store, history: History, count_tokens: CountTokens | None = None
    ) -> None:
        self.library = library
        self.history = history
        self._store = store
        self._count_tokens = count_tokens
        self._lock = threading.RLock()
        self._copies: dict[str, str] = {}
        self._previews: OrderedDict[str, list[Change]] = OrderedDict()
        self._tags: Counter[str] | None = None
        # Batches that were undone as far as could be: what is left was changed elsewhere, or is gone.
        self._passed: set[str] = set()
        self.captions, self.problems = store.read_all(library)

    def clean(self, text: str) -> str:
        """Return a caption as it would be written; CaptionTrainError for one that no place can hold."""
        return self._store.clean(text)

    def find_item(self, id: str) -> Item:
        """Return an image; UsageError where there is none of this id."""
        with self._lock:
            return self._get(id)

    def refresh(self) -> None:
        """Look for new images, and for captions that were written elsewhere."""
        with self._lock:
            self.library.scan()
            self.history.reload()
            self.captions, self.problems = self._store.read_all(self.library)
            self._tags = None

    def note_copies(self, groups: dict[str, str]) -> None:
        """Take note of which images are there several times: id → the digest that copies share."""
        with self._lock:
            self._copies = groups

    def find(self, query: Query) -> list[str]:
        """Return the ids of the images that fulfil a query, in natural order, copies together."""
        with self._lock:
            ids = [id for id, item in self.library.items() if self._fulfils(item, query)]
            if query.state == "copies":
                first: dict[str, int] = {}
                for place, id in enumerate(ids):
                    first.setdefault(self._copies[id], place)
                ids.sort(key=lambda id: first[self._copies[id]])
            texts = [self.captions.get(id, "") for id in ids]
        if query.longer_than is None:
            return ids
        # Without the lock: a model may have to be loaded before tokens are counted.
        counts = self._count(texts, query.unit)
        return [id for id, count in zip(ids, counts, strict=True) if count > query.longer_than]

    def describe(self, ids: Iterable[str]) -> list[dict[str, Any]]:
        """Return what the page shows of images; ids that there are not are left out."""
        with self._lock:
            counts = Counter(self._copies.values())
            found = (self.library.get(id) for id in ids)
            return [self._describe(item, counts) for item in found if item]

    def reread(self, id: str) -> dict[str, Any]:
        """Read one caption again, and return what the page shows of its image."""
        with self._lock:
            item = self._get(id)
            try:
                self._note(item, self._store.read(item))
            except CaptionTrainError as error:
                self.problems[id] = str(error)
            return self.describe([id])[0]

    def save(
        self, changes: Sequence[tuple[str, str, str]], action: str, accept: bool = False
    ) -> list[Outcome]:
        """Write captions, to be undone in one step.

        Args:
            changes: (id, the caption that is replaced, the new one).
            action: what is done: "edit", "suggestion" or "conflict".
            accept: mark what was written as accepted.
        """
        with self._lock:
            made = [Change(self._get(id), base, self._store.clean(text)) for id, base, text in changes]
            batch, outcomes = self._write(made, action)
            if accept:
                done = [outcome.change for outcome in outcomes if outcome.is_done]
                self.history.mark({c.item.name: {"accepted": c.text} for c in done}, batch)
            return outcomes

    def mark(self, ids: Sequence[str], *, accepted: bool | None = None, flagged: bool | None = None) -> None:
        """Mark images: accepted with the caption that they have, or flagged; or take marks away."""
        with self._lock:
            marks: dict[str, dict[str, Any]] = {}
            for item in [self._get(id) for id in ids]:
                wanted = {} if flagged is None else {"flagged": flagged}
                if accepted is not None and (self.captions.get(item.id) or not accepted):
                    wanted["accepted"] = self.captions[item.id] if accepted else None
                has = self.history.find_marks(item.name)
                if changed := {key: value for key, value in wanted.items() if value != has[key]}:
                    marks[item.name] = changed
            self.history.mark(marks)

    def are_marked(self, ids: Sequence[str], name: str) -> bool:
        """Tell whether all of these images that can be are "accepted", or all are "flagged"."""
        with self._lock:
            items = [self._get(id) for id in ids]
            if name == "flagged":
                return all(item.name in self.history.flagged for item in items)
            having = [item for item in items if self.captions.get(item.id)]
            return bool(having) and all(map(self.is_accepted, having))

    def preview(self, ids: Sequence[str], replacement: Replacement) -> tuple[str, list[Change]]:
        """Return what replacing would change, and a token by which `replace` does exactly this."""
        if not replacement.find:
            raise UsageError("find: give a text")
        with self._lock:
            changes = []
            for item in map(self._get, ids):
                before = self.captions.get(item.id, "")
                after = self._store.clean(replacement.apply(before)) if before else ""
                if after != before:
                    changes.append(Change(item, before, after))
            token = secrets.token_hex(8)
            self._previews[token] = changes
            while len(self._previews) > KEPT_PREVIEWS:
                self._previews.popitem(last=False)
            return token, changes

    def replace(self, token: str) -> list[Outcome]:
        """Do what was previewed."""
        with self._lock:
            if token not in self._previews:
                raise UsageError("this preview is too old: make another")
            return self._write(self._previews.pop(token), "replace")[1]

    def undo(self, batch_id: str | None = None) -> tuple[Batch, list[Outcome]]:
        """Undo a batch, by default the last one; what was written or marked elsewhere since then stays."""
        with self._lock:
            batch = self.history.batches.get(batch_id) if batch_id else self.history.last(self._passed)
            if batch is None or not batch.can_be_undone:
                raise UsageError("there is nothing to undo")
            by_name = {item.name: item for item in self.library.values()}
            edits = [edit for edit in batch.edits.values() if not edit.is_undone and edit.name in by_name]
            marks = [mark for mark in batch.marks.values() if not mark.is_undone and mark.name in by_name]
            # The next undo goes further back, instead of trying the same again.
            self._passed.add(batch.id)
            if not edits and not marks:
                raise UsageError("the images of this edit are not in the folder any more")
            changes = [Change(by_name[edit.name], edit.after, edit.before) for edit in edits]
            undoing, outcomes = self._write(changes, "undo", undoes=batch.id)
            self.history.mark({mark.name: self._restore(mark) for mark in marks}, undoing)
            return batch, outcomes

    def _restore(self, mark: Mark) -> dict[str, Any]:
        """Return the marks from before a mark, but for those that were changed again since then."""
        has = self.history.find_marks(mark.name)
        return {key: value for key, value in mark.before.items() if has[key] == mark.after[key]}

    def find_tags(self, prefix: str, limit: int = 20) -> list[tuple[str, int]]:
        """Return the commonest tags that contain a text, those that begin with it first, with counts."""
        with self._lock:
            if self._tags is None:
                self._tags = count_tags(self.captions.values())
            wanted = prefix.strip().casefold()
            found = [(tag, count) for tag, count in self._tags.items() if wanted in tag.casefold()]
        found.sort(key=lambda f: (not f[0].casefold().startswith(wanted), -f[1], f[0]))
        return found[:limit]

    def progress(self) -> dict[str, Any]:
        """Return the counts, and what would be undone next."""
        with self._lock:
            last = self.history.last(self._passed)
            return {
                "total": len(self.library),
                "captioned": sum(bool(text) for text in self.captions.values()),
                "accepted": sum(map(self.is_accepted, self.library.values())),
                "flagged": sum(item.name in self.history.flagged for item in self.library.values()),
                "undo": describe_batch(last) if last else None,
            }

    def is_accepted(self, item: Item) -> bool:
        """Tell whether the caption that an image has now was accepted."""
        text = self.captions.get(item.id)
        return bool(text) and self.history.accepted.get(item.name) == text

    def find_accepted(self) -> list[tuple[Item, str]]:
        """Return the images whose caption was accepted, with it."""
        with self._lock:
            return [(i, self.captions[i.id]) for i in self.library.values() if self.is_accepted(i)]

    def _write(
        self, changes: Sequence[Change], action: str, undoes: str | None = None
    ) -> tuple[Batch, list[Outcome]]:
        changes = [change for change in changes if change.text != change.base or undoes]
        batch = self.history.begin(action, [(c.item.name, c.base, c.text) for c in changes], undoes)
        outcomes = self._store.write(changes)
        self.history.void(batch, [o.change.item.name for o in outcomes if not o.is_done])
        for outcome in outcomes:
            if outcome.is_done or outcome.theirs is not None:
                self._note(
                    outcome.change.item, outcome.theirs if outcome.theirs is not None else outcome.change.text
                )
        return batch, outcomes

    def _note(self, item: Item, text: str) -> None:
        if self.captions.get(item.id) != text:
            self._tags = None
        self.captions[item.id] = text
        self.problems.pop(item.id, None)

    def _get(self, id: str) -> Item:
        if id not in self.library:
            raise UsageError("there is no such image in the folder; reload the page")
        return self.library[id]

    def _describe(self, item: Item, counts: Counter[str]) -> dict[str, Any]:
        text = self.captions.get(item.id, "")
        return {
            "id": item.id,
            "name": escape_unprintable(item.name),
            "version": item.version,
            "caption": text,
            "words": count_words(text),
            "accepted": self.is_accepted(item),
            "flagged": item.name in self.history.flagged,
            "changed": self._is_changed(item),
            "copies": counts.get(self._copies.get(item.id, ""), 1),
            "problem": self.problems.get(item.id, ""),
        }

    def _is_changed(self, item: Item) -> bool:
        original = self.history.originals.get(item.name)
        return original is not None and original != self.captions.get(item.id, "")

    def _fulfils(self, item: Item, query: Query) -> bool:
        text = self.captions.get(item.id, "")
        if query.contains and query.contains.casefold() not in text.casefold():
            return False
        if query.tag and query.tag not in split_tags(text):
            return False
        by_state = {
            "": lambda: True,
            "empty": lambda: not text,
            "flagged": lambda: item.name in self.history.flagged,
            "changed": lambda: self._is_changed(item),
            "accepted": lambda: self.is_accepted(item),
            "open": lambda: not self.is_accepted(item),
            "copies": lambda: item.id in self._copies,
            "problem": lambda: item.id in self.problems,
        }
        return by_state[query.state]()

    def _count(self, texts: Sequence[str], unit: str) -> list[int]:
        if unit == "words":
            return list(map(count_words, texts))
        if self._count_tokens is None:
            raise UsageError("tokens are a model's: start with --peft_model or --base_model")
        return self._count_tokens(texts)


def describe_batch(batch: Batch) -> dict[str, Any]:
    """Return what the page shows of one step of the history."""
    first = next(iter([*batch.edits.values(), *batch.marks.values()]), None)
    before, after = (
        (first.before, first.after)
        if isinstance(first, Edit)
        else (_name_marks(first.before), _name_marks(first.after))
        if first
        else ("", "")
    )
    return {
        "batch": batch.id,
        "action": batch.action,
        "time": batch.time,
        "count": len(batch.edits.keys() | batch.marks.keys()),
        "can_undo": batch.can_be_undone,
        "name": escape_unprintable(first.name) if first else "",
        "before": before,
        "after": after,
    }


def _name_marks(marks: Mapping[str, Any]) -> str:
    """Return marks in words.

    >>> _name_marks({"accepted": "a cat", "flagged": False})
    'accepted, not flagged'
    """
    has = {key: value is not None and value is not False for key, value in sorted(marks.items())}
    return ", ".join(key if value else f"not {key}" for key, value in has.items())
