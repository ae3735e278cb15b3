"""Tests your own sources and transforms by the resume contract. Nothing here needs pytest."""

from jest_stream.testing.resume import assert_resumes

__all__ = ["assert_resumes"]
