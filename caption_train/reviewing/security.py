"""Decides which requests are answered: those of the page itself, in a browser that was let in.

Any web page that a person visits may send requests to this machine. So the Host header must name this
server (against DNS rebinding), and what changes something must come from the page's own origin, as JSON, with
a token that only the page has (against forged requests). Where other machines reach the server, a second
token is demanded, which is in the printed address and then in a cookie.
"""

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from caption_train.config.reviewing import is_loopback

COOKIE = "caption-train-review"
PAGE_TOKEN = "x-review-token"
MOST_BODY_BYTES = 16 << 20
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True)
class Access:
    """Who is let in.

    Attributes:
        host: the address that the server listens at.
        port: its port.
        page_token: what the page sends with every change.
        entry_token: what the printed address holds; None where only this machine reaches the server.
        cookie: what a browser has that came with the entry token.
    """

    host: str
    port: int
    page_token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    entry_token: str | None = None
    cookie: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @classmethod
    def to(cls, host: str, port: int) -> "Access":
        """Return the access to a server: with a token unless only this machine reaches it."""
        return cls(host, port, entry_token=None if is_loopback(host) else secrets.token_urlsafe(32))

    @property
    def address(self) -> str:
        """The page's address, to be printed."""
        name = "127.0.0.1" if self.host == "localhost" else self.host
        if self.host in ("0.0.0.0", "::"):
            name = socket.gethostname()
        shown = f"[{name}]" if ":" in name else name
        token = f"?token={self.entry_token}" if self.entry_token else ""
        return f"http://{shown}:{self.port}/{token}"

    def knows_host(self, header: str) -> bool:
        """Tell whether a Host header names this server.

        A name that leads here by somebody else's DNS is refused; an address cannot be made to lead elsewhere.
        """
        name, _, port = header.rpartition(":")
        if port != str(self.port):
            return False
        name = name.lower()
        if name in ("localhost", self.host.lower()) or is_loopback(name):
            return True
        return self.entry_token is not None and (_is_address(name) or name == socket.gethostname().lower())


class Guard:
    """Answers what may not be asked, and gives every answer the headers that a browser needs.

    Args:
        app: what answers the rest.
        access: who is let in.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._refuse(scope)
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refuse(self, scope: Scope) -> Response | None:
        """Return the answer to a request that is not let through."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._access.knows_host(hosts[0]):
            return _error(421, "this server is not known by that name; use the address that was printed")
        if self._access.entry_token is not None and (answer := self._check_entry(scope, headers)):
            return answer
        is_page = scope["path"] == "/" and headers.get("sec-fetch-mode", "navigate") == "navigate"
        if not is_page and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _error(403, "this was asked by another site")
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST":
            return _error(405, "there is no such method")
        return self._check_change(headers, hosts[0])

    def _check_entry(self, scope: Scope, headers: Headers) -> Response | None:
        if _equal(_read_cookie(headers.getlist("cookie")), self._access.cookie):
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if (
            scope["path"] != "/"
            or scope["method"] != "GET"
            or not _equal(given, self._access.entry_token or "")
        ):
            return _error(401, "the address that was printed lets you in, with the token in it")
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, self._access.cookie, httponly=True, samesite="strict", path="/")
        return answer

    def _check_change(self, headers: Headers, host: str) -> Response | None:
        if headers.getlist("origin") != [f"http://{host}"]:
            return _error(403, "this was asked by another site")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _error(415, "only JSON is read")
        if not _equal(headers.get(PAGE_TOKEN, ""), self._access.page_token):
            return _error(403, "the server was started again: reload the page")
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdecimal()):
            return _error(411, "the length is not said")
        if int(length) > MOST_BODY_BYTES:
            return _error(413, f"more than {MOST_BODY_BYTES >> 20} MB")
        return None


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)


def _equal(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), wanted.encode())


def _read_cookie(headers: Iterable[str]) -> str:
    try:
        morsel = SimpleCookie("; ".join(headers)).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
