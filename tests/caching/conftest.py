"""What holds for the tests of the cache."""

from __future__ import annotations

import pytest
from remote import start_loop


@pytest.fixture(scope="session", autouse=True)
def _threads_of_fsspec() -> None:
    """Starts what fsspec keeps in every process that uses it, so that it does not look leaked."""
    start_loop()
