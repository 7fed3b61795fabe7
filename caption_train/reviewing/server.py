"""Starts the review page and serves it until Ctrl-C."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from caption_train.config.reviewing import ReviewOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.reviewing.items import Library
from caption_train.system.console import escape_unprintable, print_line, print_result
from caption_train.system.files import cache_folder, clear_temporary
from caption_train.system.processes import refuse_several_processes
from caption_train.system.signals import raising_terminated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from caption_train.reviewing.calls import Parts
    from caption_train.reviewing.suggestions import Suggester

EXTRA = ("starlette", "uvicorn")


def review_folder(options: ReviewOptions) -> int:
    """Serve the review page until Ctrl-C, then print what was reached and the command that trains.

    Returns:
        The exit code.

    Raises:
        UsageError: the options cannot work.
        CaptionTrainError: the port cannot be used.
    """
    refuse_several_processes("review")
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the review page needs {' and '.join(missing)}: install with pip install '.[review]', or "
            f"pip install {' '.join(EXTRA)}"
        )
    with listening(options.host, options.port) as listener:
        parts = open_parts(options, listener.getsockname()[1])
        print_line(*parts.review.library.notes)
        print_result(f"Review {_describe(parts)} at {parts.access.address}")
        print_line("Ctrl-C ends it; every caption is saved at once.")
        if parts.access.entry_token:
            print_line("Whoever has this address can read and change the captions; it is sent unencrypted.")
        stopped = threading.Event()
        threading.Thread(target=look_for_copies, args=(parts, stopped.is_set), daemon=True).start()
        try:
            with raising_terminated():
                serve(parts, listener)
        except KeyboardInterrupt:
            pass  # which is how a review ends
        finally:
            stopped.set()
    _print_end(parts)
    return 0


def open_parts(options: ReviewOptions, port: int) -> Parts:
    """Return what the page works with.

    Args:
        options: the options of the command.
        port: the port that the server listens at.

    Raises:
        UsageError: the folder or the model cannot be used.
    """
    from caption_train.reviewing.accepted import choose_output_dir
    from caption_train.reviewing.calls import Parts
    from caption_train.reviewing.history import History
    from caption_train.reviewing.review import Review
    from caption_train.reviewing.security import Access
    from caption_train.reviewing.stores import open_store
    from caption_train.reviewing.thumbnails import Thumbnails

    library = Library(options.images)
    suggester = _make_suggester(options, library)
    for folder in {item.path.parent for item in library.values()} | {library.root}:
        clear_temporary(folder)
    store = open_store(library, options.save_to, options.caption_extension)
    history = History(library.root)
    review = Review(library, store, history, suggester.count_tokens if suggester else None)
    return Parts(
        review,
        Thumbnails(library, cache_folder("thumbnails"), options.cache_mb << 20),
        Access.to(options.host, port),
        choose_output_dir(options.images, options.output_dir),
        suggester,
    )


def serve(parts: Parts, listener: socket.socket, started: Callable[[object], None] | None = None) -> None:
    """Answer requests until a signal, or until `should_exit` of the server is set.

    Args:
        parts: what the page works with.
        listener: a socket that is bound.
        started: is given uvicorn's server before it starts.
    """
    import uvicorn

    from caption_train.reviewing.app import make_app
    from caption_train.reviewing.security import Guard

    config = uvicorn.Config(
        Guard(make_app(parts), parts.access),
        log_level="error",
        access_log=False,  # whose lines would hold the token
        http="h11",
        ws="none",
        lifespan="off",
        loop="asyncio",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    server = uvicorn.Server(config)
    if started:
        started(server)
    server.run(sockets=[listener])


def _make_suggester(options: ReviewOptions, library: Library) -> Suggester | None:
    if not options.suggests:
        return None
    from caption_train.reviewing.suggestions import Suggester, find_family

    return Suggester(options, find_family(options), library)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open a socket for the server, port 0 taking a free one; CaptionTrainError where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {escape_unprintable(host)}: there is no such address") from error
    with socket.socket(family, kind, protocol) as listener:
        try:
            if hasattr(socket, "SO_REUSEPORT"):  # not on Windows, where it would share the port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)  # before the address is printed: who is early waits
        except OSError as error:
            reason = error.strerror or error
            raise CaptionTrainError(
                f"--port {port}: cannot be used at {escape_unprintable(host)} ({reason}); give another, or 0 "
                "for a free one"
            ) from error
        yield listener


def look_for_copies(parts: Parts, is_stopped: Callable[[], bool] = lambda: False) -> None:
    """Have the page know which images are in the folder several times; it may take a while."""
    from caption_train.data.copies import find_copies

    files = {item.id: item.path for item in list(parts.review.library.values())}
    parts.review.note_copies(find_copies(files, is_stopped))


def _describe(parts: Parts) -> str:
    progress = parts.review.progress()
    return (
        f"{progress['total']:,} images ({progress['captioned']:,} with a caption, "
        f"{progress['accepted']:,} accepted)"
    )


def _print_end(parts: Parts) -> None:
    from caption_train.reviewing.accepted import write_accepted

    print_line("")
    parts.review.refresh()
    accepted = parts.review.find_accepted()
    print_line(f"{_describe(parts)}; the history is in {escape_unprintable(parts.review.history.path)}")
    if not accepted:
        return
    left_out = write_accepted(parts.review.library.root, parts.output_dir, accepted)
    print_line(f"{len(accepted) - left_out:,} accepted images are in {escape_unprintable(parts.output_dir)}")
    print_result("Next:\n" + "\n".join(f"  {line}" for line in parts.list_commands()))
