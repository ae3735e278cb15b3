"""For tests of your own sources and transforms: a server that misbehaves, the resume contract.

Nothing here needs pytest.
"""

from jest_stream.testing.faults import Fault, FaultServer, Request
from jest_stream.testing.resume import assert_resumes

__all__ = ["Fault", "FaultServer", "Request", "assert_resumes"]
