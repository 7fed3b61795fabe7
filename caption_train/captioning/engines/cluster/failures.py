"""Explains what goes wrong on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from caption_train.errors import CaptionTrainError


@contextmanager
def explaining_ray() -> Iterator[None]:
    """Turn what Ray raises into one line."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = find_cause(error)
        if isinstance(cause, CaptionTrainError):
            raise cause from None
        raise CaptionTrainError(f"--engine ray: {last_line(cause)}") from error
    except (ray.exceptions.RayError, OSError) as error:
        address = os.environ.get("RAY_ADDRESS")
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a cluster on this machine"
        raise CaptionTrainError(f"--engine ray: {where}: {last_line(error)}") from error


def find_cause(error: BaseException) -> BaseException:
    """Return what was raised in a task or in one that it waited for; any other error as it is."""
    import ray.exceptions

    while isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def last_line(error: BaseException) -> str:
    """Return the last line of what an error says; Ray's first ones are of the process that raised it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
