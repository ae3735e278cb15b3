"""Data of worker processes arrive whole, or are an error that leaves nothing open.

pytest tests/workers/test_transport.py
"""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize("num_rows", [3, 3000])  # through the socket, and through memory
def test_tensors_and_arrays_arrive_wherever_they_are(num_rows: int) -> None:
    """They lie at other places of one piece of memory, so each is compared with the one sent."""
    sent = {
        "nested": [(torch.arange(num_rows * 7).reshape(num_rows, 7), "text")],
        "array": np.arange(num_rows * 5, dtype=np.int16),
        "empty": (torch.zeros(0, 4), np.zeros((0, 2))),
        "bits": torch.arange(num_rows) % 2 == 0,
        "half": torch.linspace(0, 1, num_rows).bfloat16(),
        "gradient": torch.ones(2, requires_grad=True),
    }
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        message = transport.Message(sent)
        assert (message.num_bytes > 1 << 16) == (num_rows > 3)
        message.send(theirs)
        arrived = transport.receive(ours, None, 5.0)
    assert torch.equal(arrived["nested"][0][0], sent["nested"][0][0])  # type: ignore[arg-type]
    assert arrived["nested"][0][1] == "text"
    np.testing.assert_array_equal(arrived["array"], sent["array"])
    arrived["array"][0] = 1  # writable, as what was sent
    assert arrived["empty"][0].shape == (0, 4) and arrived["empty"][1].shape == (0, 2)
    for name in ("bits", "half"):
        assert torch.equal(arrived[name], sent[name])
        assert arrived[name].dtype == sent[name].dtype  # type: ignore[union-attr]
    assert not arrived["gradient"].requires_grad
