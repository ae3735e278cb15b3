"""What holds for every test."""

import gc
import signal

import pytest
import torch
from support.s3_server import s3  # noqa: F401  a fixture

# The tests' matrices are tiny: a second thread only waits for the first.
torch.set_num_threads(1)
# A shell's background jobs ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Has the garbage collector pass over what was imported, which took it a tenth of the time."""
    del session
    gc.collect()
    gc.freeze()
