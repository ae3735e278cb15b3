"""Starts, watches and ends worker processes, and packs the messages to and from them."""

from jest_stream.workers.process import (
    Finalizer,
    Job,
    ParentConnection,
    Worker,
    start_workers,
    stop_workers,
)
from jest_stream.workers.transport import (
    Failure,
    Message,
    WorkerTraceback,
    failure_message,
)
from jest_stream.workers.watch import Activity, Watchdog, WorkerStatus

__all__ = [
    "Activity",
    "Failure",
    "Finalizer",
    "Job",
    "Message",
    "ParentConnection",
    "Watchdog",
    "Worker",
    "WorkerStatus",
    "WorkerTraceback",
    "failure_message",
    "start_workers",
    "stop_workers",
]
