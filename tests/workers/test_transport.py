"""What worker processes send arrives whole, or is an error that leaves nothing open.

pytest tests/workers/test_transport.py
"""

from __future__ import annotations

import os
import socket

import pytest
from support.leaks import no_leaks  # noqa: F401

from jest_stream.workers import transport

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("kind", [EOFError, TimeoutError])
def test_a_message_that_breaks_off_leaves_no_descriptor(kind: type[Exception]) -> None:
    """Its memory arrives with the first byte of the header; the rest never does."""
    ours, theirs = socket.socketpair()
    sentinel, end = os.pipe()  # of a process that lives
    memory = transport.new_memory()
    ours.setblocking(False)
    with ours, theirs:
        socket.send_fds(theirs, [b"\0"], [memory.fileno()])
        if kind is EOFError:
            theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(kind):
            transport.receive(ours, sentinel, 0.2)
    memory.close()
    for descriptor in (sentinel, end):
        os.close(descriptor)
