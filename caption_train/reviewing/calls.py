"""What the page can ask for and do: each function answers one address below /api with a JSON object."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.reviewing.accepted import list_commands, write_accepted
from caption_train.reviewing.queries import Query, Replacement
from caption_train.reviewing.review import Review, describe_batch
from caption_train.reviewing.security import Access
from caption_train.reviewing.stores import Outcome
from caption_train.reviewing.suggestions import Suggester, Wish
from caption_train.reviewing.thumbnails import Thumbnails

MOST_ITEMS = 200
MOST_SHOWN = 200
"""Changes of a preview, or steps of the history, that the page shows."""
MARKS = ("accepted", "flagged")
ACTIONS = ("edit", "suggestion", "conflict")


@dataclass(frozen=True)
class Parts:
    """What the page works with.

    Attributes:
        review: captions, marks and history.
        thumbnails: small pictures.
        access: who is let in; the page gets its token.
        output_dir: where what was accepted is written.
        suggester: the model; None where there is none.
    """

    review: Review
    thumbnails: Thumbnails
    access: Access
    output_dir: Path
    suggester: Suggester | None = None

    @property
    def family(self) -> str | None:
        """The name of the model's family."""
        return self.suggester.family.name if self.suggester else None

    def list_commands(self) -> list[str]:
        """Return the commands that train on what was accepted."""
        adapter = self.suggester.adapter if self.suggester else None
        return list_commands(self.output_dir, self.family, adapter)


class Values:
    """The values of a request, each checked when it is taken."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.all = values

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """Return a value of a kind; UsageError for one of another kind."""
        value = self.all.get(name, default)
        if value is default:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{name}: is not what it should be")
        return value

    def need(self, name: str, kind: type) -> Any:
        """Return a value that must be there."""
        if name not in self.all:
            raise UsageError(f"{name}: is missing")
        return self.get(name, kind, object())

    def need_ids(self) -> list[str]:
        """Return the ids that a request is about, each once."""
        ids = self.need("ids", list)
        if not all(isinstance(id, str) for id in ids):
            raise UsageError("ids: is not what it should be")
        return list(dict.fromkeys(ids))


def state(parts: Parts, values: Values) -> dict[str, Any]:
    """Return counts, the model, and what is common to the page."""
    suggester = parts.suggester
    model = suggester and {
        "prompt": suggester.base.prompt,
        "name": str(suggester.base.model_id),
        "is_loaded": suggester.is_loaded,
    }
    library = parts.review.library
    return parts.review.progress() | {
        "folder": Path(library.real_root).name.encode("utf-8", "replace").decode(),
        "model": model,
        "notes": library.notes[:MOST_SHOWN],
    }


def ids(parts: Parts, values: Values) -> dict[str, Any]:
    """Return the ids of all images that fulfil a query."""
    return {"ids": parts.review.find(Query.read(values.all))}


def items(parts: Parts, values: Values) -> dict[str, Any]:
    """Return what the page shows of some images."""
    return {"items": parts.review.describe(values.need("ids", str).split(",")[:MOST_ITEMS])}


def item(parts: Parts, values: Values) -> dict[str, Any]:
    """Return what the page shows of one image, its caption read again."""
    return {"item": parts.review.reread(values.need("id", str))}


def tags(parts: Parts, values: Values) -> dict[str, Any]:
    """Return tags that contain a text."""
    return {"tags": parts.review.find_tags(values.get("prefix", str, ""))}


def history(parts: Parts, values: Values) -> dict[str, Any]:
    """Return the newest steps."""
    batches = [b for b in parts.review.history.batches.values() if b.edits or b.marks][-MOST_SHOWN:]
    return {"batches": [describe_batch(batch) for batch in reversed(batches)]}


def save(parts: Parts, values: Values) -> dict[str, Any]:
    """Write one caption; a conflict is returned with both texts."""
    id, base, text = (values.need(name, str) for name in ("id", "base", "text"))
    action = values.get("action", str, "edit")
    if action not in ACTIONS:
        raise UsageError("action: is not what it should be")
    if base == parts.review.clean(text):
        # Nothing to write, but perhaps to accept, if it is still there.
        if (now := parts.review.reread(id))["caption"] != base:
            return {"conflict": {"theirs": now["caption"], "yours": text}, "item": now}
        if values.get("accept", bool, False):
            parts.review.mark([id], accepted=True)
        return {"item": parts.review.describe([id])[0]}
    outcomes = parts.review.save([(id, base, text)], action, values.get("accept", bool, False))
    shown = {"item": parts.review.describe([id])[0]}
    for outcome in outcomes:
        if outcome.problem:
            raise CaptionTrainError(outcome.problem)
        if outcome.theirs is not None:
            return shown | {"conflict": {"theirs": outcome.theirs, "yours": text}}
    return shown


def mark(parts: Parts, values: Values) -> dict[str, Any]:
    """Accept or flag images, or take it back; `toggle` names a mark to take back if all have it."""
    chosen = values.need_ids()
    if (toggled := values.get("toggle", str, None)) is not None:
        if toggled not in MARKS:
            raise UsageError("toggle: is not what it should be")
        parts.review.mark(chosen, **{toggled: not parts.review.are_marked(chosen, toggled)})
    parts.review.mark(
        chosen, accepted=values.get("accepted", bool, None), flagged=values.get("flagged", bool, None)
    )
    return {"items": parts.review.describe(chosen[:MOST_ITEMS])}


def preview(parts: Parts, values: Values) -> dict[str, Any]:
    """Return what find and replace would change."""
    replacement = Replacement(
        values.need("find", str),
        values.need("replace", str),
        values.get("match_case", bool, True),
        values.get("whole_words", bool, False),
    )
    token, changes = parts.review.preview(values.need_ids(), replacement)
    shown = [{"name": _show(c.item.name), "before": c.base, "after": c.text} for c in changes[:MOST_SHOWN]]
    return {"preview": token, "count": len(changes), "changes": shown}


def replace(parts: Parts, values: Values) -> dict[str, Any]:
    """Do what was previewed."""
    return _summarize(parts.review.replace(values.need("preview", str)))


def undo(parts: Parts, values: Values) -> dict[str, Any]:
    """Undo a step, by default the last one."""
    batch, outcomes = parts.review.undo(values.get("batch", str, None))
    undone = _summarize(outcomes) | {"undone": describe_batch(batch)}
    # Marks can always be undone; captions that were edited elsewhere are kept.
    return undone | ({} if batch.edits else {"done": len(batch.marks)})


def refresh(parts: Parts, values: Values) -> dict[str, Any]:
    """Look for what others have written."""
    parts.review.refresh()
    return state(parts, values)


def suggest(parts: Parts, values: Values) -> Any:
    """Ask the model for a caption."""
    if parts.suggester is None:
        raise UsageError("there is no model: start with --peft_model or --base_model")
    wish = Wish(
        values.get("prompt", str, parts.suggester.base.prompt),
        float(values.get("temperature", float | int, 0.0)),
        values.get("beams", int, None),
        values.get("try_number", int, 0),
    )
    return parts.suggester.suggest(parts.review.find_item(values.need("id", str)), wish)


def finish(parts: Parts, values: Values) -> dict[str, Any]:
    """Write what was accepted, and return the commands that train on it."""
    parts.review.refresh()  # an accepted caption may have been changed elsewhere
    accepted = parts.review.find_accepted()
    left_out = write_accepted(parts.review.library.root, parts.output_dir, accepted)
    return {
        "count": len(accepted) - left_out,
        "left_out": left_out,
        "folder": _show(parts.output_dir),
        "commands": parts.list_commands(),
    }


READERS = (state, ids, items, item, tags, history)
WRITERS = (save, mark, preview, replace, undo, refresh, suggest, finish)


def _summarize(outcomes: list[Outcome]) -> dict[str, Any]:
    kept = [
        {"name": _show(o.change.item.name), "theirs": o.theirs, "problem": o.problem}
        for o in outcomes
        if not o.is_done
    ]
    return {"done": len(outcomes) - len(kept), "kept": kept[:MOST_SHOWN], "kept_count": len(kept)}


def _show(name: str | Path) -> str:
    return os.fsencode(name).decode("utf-8", "replace")
