"""Workers end with their training process, however it ends: the script's part, and the check.

The script starts workers, then calls `come_to(sys.argv[1], read)`; `assert_no_worker_outlives` runs
it to "end", or to one of `EARLY_ENDS`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

#        how it ends   signal, to whom               status
ENDS: dict[str, tuple[signal.Signals | None, str, int]] = {
    "end": (None, "", 0),
    "exit": (None, "", 3),
    "error": (None, "", 1),
    "SIGTERM": (signal.SIGTERM, "process", -signal.SIGTERM),
    "SIGKILL": (signal.SIGKILL, "process", -signal.SIGKILL),
    "read on": (signal.SIGINT, "group", -signal.SIGINT),
}
EARLY_ENDS = [end for end in ENDS if end != "end"]


def come_to(end: str, read: Callable[[], object]) -> None:
    """Says which workers there are, then ends the script, or waits to be ended; "end" goes on."""
    print(*[child.pid for child in psutil.Process().children()], flush=True)
    if end == "exit":
        sys.exit(3)
    if end == "error":
        raise LookupError("of the training loop")
    while end == "read on":
        read()
    if end != "end":
        threading.Event().wait()


def assert_no_worker_outlives(
    script: str, end: str, arguments: list[str], *, num_workers: int
) -> None:
    """Runs the script to this end; Ctrl-C reaches the whole group, as in a terminal."""
    number, target, status = ENDS[end]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    running = subprocess.Popen(
        [sys.executable, "-c", script, end, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
    assert running.stdout is not None
    pids = [int(pid) for pid in running.stdout.readline().split()]
    assert len(pids) == num_workers
    workers = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    if number is not None:
        send = os.killpg if target == "group" else os.kill
        send(running.pid, number)
    start = time.monotonic()
    _, stderr = running.communicate(timeout=20)
    assert running.returncode == status, stderr
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    assert time.monotonic() - start < 10
    if end in ("error", "read on"):  # of the training process; none of the workers
        assert stderr.count("Traceback") == 1, stderr
    else:
        assert stderr == ""
