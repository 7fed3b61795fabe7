"""Answers the page's requests: the page itself, pictures, and the JSON of `calls`."""

import asyncio
import json
import os
from asyncio import Semaphore
from collections.abc import Awaitable, Callable, Mapping
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
from caption_train.reviewing.calls import READERS, WRITERS, Parts, Values
from caption_train.system.console import escape_unprintable

TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_YEAR = "private, max-age=31536000, immutable"


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
            values = Values(_parse(await request.body()))
        else:
            values = Values(dict(request.query_params))
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
