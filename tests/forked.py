"""Training scripts in forked processes, which may be killed: forking spares every one of them the imports."""

import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from caption_train.cli.exit_codes import run

_groups = itertools.count()
PATIENCE = 240


@dataclass
class Child:
    """A process that does some work as a script would. `log` is what it printed."""

    process_id: int
    log: Path

    def wait(self) -> int:
        """Return the exit code, negative for the signal that killed it, as subprocess does.

        A process that hangs is killed after PATIENCE seconds: a failed test says more than one that waits.
        """
        for _ in range(10 * PATIENCE):
            process_id, status = os.waitpid(self.process_id, os.WNOHANG)
            if process_id:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        self.kill()
        return os.waitstatus_to_exitcode(os.waitpid(self.process_id, 0)[1])

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process_id, number)


def start(work: Callable[[], object], log: Path, **environment: str) -> Child:
    """Start `work` in a process of its own, its exit code the one that a script would have."""
    sys.stdout.flush()
    process_id = os.fork()
    if process_id:
        return Child(process_id, log)
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ |= environment
        torch.set_num_threads(1)
        # Forks of one process share tqdm's own lock, and one that is killed would keep it for ever.
        tqdm.set_lock(threading.RLock())

        def do() -> int:
            work()
            return 0

        code = run(do)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_ranks(count: int, work: Callable[[], object], log: Path) -> list[Child]:
    """Start `work` on every rank of a gloo group, as torchrun would, rank 0 first."""
    # Below the ports that the system gives out, and another one in every process and for every group.
    port = 20_000 + (16 * os.getpid() + next(_groups)) % 12_000
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        start(work, log, **group, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
        for rank in range(count)
    ]
