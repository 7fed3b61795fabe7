"""Answers the page's requests: the page itself, pictures, and a small JSON interface."""

import asyncio
import json
import os
from asyncio import Semaphore
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.reviewing.accepted import list_commands, write_accepted
from caption_train.reviewing.queries import Query, Replacement
from caption_train.reviewing.review import Review, describe_batch
from caption_train.reviewing.security import Access
from caption_train.reviewing.stores import Outcome
from caption_train.reviewing.suggestions import Suggester, Wish
from caption_train.reviewing.thumbnails import Thumbnails
from caption_train.system.console import escape_unprintable

TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MOST_ITEMS = 200
MOST_SHOWN = 200
"""Changes of a preview, or steps of the history, that the page shows."""
_YEAR = "private, max-age=31536000, immutable"
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


def make_app(parts: Parts) -> Starlette:
    """Return the application, without the guard in front of it."""
    pages, pictures = _Pages(parts), _Pictures(parts)
    routes = [
        Route("/", pages.index),
        *(Route(f"/static/{name}", pages.make_file(name, type)) for name, type in _list_static()),
        Route("/thumbnail/{id}", pictures.answer("thumbnail")),
        Route("/picture/{id}", pictures.answer("picture")),
        *(Route(f"/api/{call.__name__}", _answer(call, parts), methods=["GET"]) for call in READERS),
        *(Route(f"/api/{call.__name__}", _answer(call, parts), methods=["POST"]) for call in WRITERS),
    ]
    return Starlette(
        routes=routes,
        exception_handlers={
            CaptionTrainError: _explain,
            OSError: _explain_system,
            HTTPException: _explain_http,
        },
    )


class Json(Response):
    """JSON in ASCII, because a caption may hold half characters, which UTF-8 has none of."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the bytes of the answer."""
        return json.dumps(content).encode()


async def _explain(request: Request, error: Exception) -> Response:
    return Json({"error": str(error)}, 422)


async def _explain_system(request: Request, error: Exception) -> Response:
    where, reason = getattr(error, "filename", None), getattr(error, "strerror", None) or str(error)
    return Json({"error": f"{escape_unprintable(where)}: {reason}" if where else reason}, 422)


async def _explain_http(request: Request, error: Exception) -> Response:
    return Json({"error": getattr(error, "detail", "")}, getattr(error, "status_code", 500))


def _answer(call: Callable, parts: Parts) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        if request.method == "POST":
            values = _Values(_parse(await request.body()))
        else:
            values = _Values(dict(request.query_params))
        content = await run_in_threadpool(call, parts, values)
        if isinstance(content, asyncio.Future) or hasattr(content, "add_done_callback"):
            content = {"text": await asyncio.wrap_future(content)}
        return Json(content, 409 if "conflict" in content else 200)

    return answer


def _parse(body: bytes) -> Mapping[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise UsageError("this is no JSON") from None
    if not isinstance(values, dict):
        raise UsageError("this is no JSON object")
    return values


class _Values:
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


def state(parts: Parts, values: _Values) -> dict[str, Any]:
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


def ids(parts: Parts, values: _Values) -> dict[str, Any]:
    """Return the ids of all images that fulfil a query."""
    return {"ids": parts.review.find(Query.read(values.all))}


def items(parts: Parts, values: _Values) -> dict[str, Any]:
    """Return what the page shows of some images."""
    return {"items": parts.review.describe(values.need("ids", str).split(",")[:MOST_ITEMS])}


def item(parts: Parts, values: _Values) -> dict[str, Any]:
    """Return what the page shows of one image, its caption read again."""
    return {"item": parts.review.reread(values.need("id", str))}


def tags(parts: Parts, values: _Values) -> dict[str, Any]:
    """Return tags that contain a text."""
    return {"tags": parts.review.find_tags(values.get("prefix", str, ""))}


def history(parts: Parts, values: _Values) -> dict[str, Any]:
    """Return the newest steps."""
    batches = [b for b in parts.review.history.batches.values() if b.edits][-MOST_SHOWN:]
    return {"batches": [describe_batch(batch) for batch in reversed(batches)]}


def save(parts: Parts, values: _Values) -> dict[str, Any]:
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


def mark(parts: Parts, values: _Values) -> dict[str, Any]:
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


def preview(parts: Parts, values: _Values) -> dict[str, Any]:
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


def replace(parts: Parts, values: _Values) -> dict[str, Any]:
    """Do what was previewed."""
    return _summarize(parts.review.replace(values.need("preview", str)))


def undo(parts: Parts, values: _Values) -> dict[str, Any]:
    """Undo a step, by default the last one."""
    batch, outcomes = parts.review.undo(values.get("batch", str, None))
    return _summarize(outcomes) | {"undone": describe_batch(batch)}


def refresh(parts: Parts, values: _Values) -> dict[str, Any]:
    """Look for what others have written."""
    parts.review.refresh()
    return state(parts, values)


def suggest(parts: Parts, values: _Values) -> Any:
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


def finish(parts: Parts, values: _Values) -> dict[str, Any]:
    """Write what was accepted, and return the commands that train on it."""
    parts.review.refresh()  # an accepted caption may have been changed elsewhere
    accepted = parts.review.find_accepted()
    left_out = write_accepted(parts.review.library.root, parts.output_dir, accepted)
    return {
        "count": len(accepted) - left_out,
        "left_out": left_out,
        "folder": _show(parts.output_dir),
        "commands": list_commands(parts.output_dir, parts.family),
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


class _Pages:
    """The page, its scripts and styles: read once, so that no path from outside reaches the disk."""

    def __init__(self, parts: Parts) -> None:
        self._folder = files("caption_train.reviewing") / "static"
        text = (self._folder / "index.html").read_text("utf-8")
        self._index = text.replace("{{page_token}}", parts.access.page_token)

    async def index(self, request: Request) -> Response:
        """Return the page."""
        return Response(self._index, media_type="text/html")

    def make_file(self, name: str, type: str) -> Callable[[Request], Awaitable[Response]]:
        """Return what answers with one file."""
        content = (self._folder / name).read_bytes()

        async def answer(request: Request) -> Response:
            return Response(content, media_type=type)

        return answer


def _list_static() -> list[tuple[str, str]]:
    names = [entry.name for entry in (files("caption_train.reviewing") / "static").iterdir()]
    return [(name, TYPES[suffix]) for name in sorted(names) if (suffix := Path(name).suffix) in TYPES]


class _Pictures:
    """Pictures of the images, as many at once as there are cores."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._places = Semaphore(min(4, os.cpu_count() or 1))

    def answer(self, kind: str) -> Callable[[Request], Awaitable[Response]]:
        """Return what answers with pictures of a kind."""

        async def answer(request: Request) -> Response:
            item = self._parts.review.library.get(request.path_params["id"])
            if item is None:
                return Json({"error": "there is no such image"}, 404)
            async with self._places:
                if await request.is_disconnected():
                    return Response(status_code=499)  # scrolled past
                try:
                    content = await run_in_threadpool(self._parts.thumbnails.get, item, kind)
                except CaptionTrainError as error:
                    return Json({"error": str(error)}, 422)
            return Response(content, media_type="image/jpeg", headers={"cache-control": _YEAR})

        return answer
