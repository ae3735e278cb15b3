"""Image files that a dataset names by path instead of holding their bytes.

In: a path of a row. Out: the file's bytes, undecoded. Runs where rows are read. No threads.
"""

from __future__ import annotations

from jest_stream.errors import BadExampleError, ShardUnavailableError
from jest_stream.storage import Storage, scheme_of

_MAX_BYTES = 256 << 20


def load_image(path: str) -> bytes:
    """Returns the bytes of a local file. Addresses are refused, since a row may name any host.

    Raises:
      BadExampleError: if it is no local file that can be read, or too large.
    """
    if "://" in path or "::" in path or scheme_of(path):
        raise _bad(path, "is not a local file; the row should hold the image's bytes")
    try:
        with Storage().open(path) as file:
            data = file.read(_MAX_BYTES + 1)
    except ShardUnavailableError as error:
        raise _bad(path, "cannot be opened") from error
    if len(data) > _MAX_BYTES:
        raise _bad(path, f"is larger than {_MAX_BYTES:,} bytes")
    return data


def _bad(path: str, fault: str) -> BadExampleError:
    return BadExampleError(
        f"image {path!r}, which the dataset names, {fault}. Embed the images in the dataset, or "
        "skip bad examples.",
        key=path,
        reason="image_not_embedded",
    )
