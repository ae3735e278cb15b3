"""For tests of your own sources and transforms: the resume contract. Nothing here needs pytest."""

from jest_stream.testing.resume import assert_resumes

__all__ = ["assert_resumes"]
