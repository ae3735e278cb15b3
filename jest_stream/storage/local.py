"""Opens shards on a local disk: nothing lies between a file and its reader but a buffer."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from jest_stream.errors import ConfigError, ShardChangedError, ShardUnavailableError
from jest_stream.types import ObjectInfo

# Headers and small members come from the buffer, large members go round it. 64 lanes: 16 MiB.
BUFFER_BYTES = 256 * 1024


def local_info(path: str) -> ObjectInfo:
    """Returns the length of a local shard.

    Raises:
      ShardUnavailableError: if it does not exist.
      ConfigError: if it is no file.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unavailable(path, error) from error
    # A pipe or a device has no length, and cannot be read again from an offset.
    if stat.S_ISDIR(status.st_mode):
        raise ConfigError(
            f"source {path!r} is a folder, not a shard; "
            f"pass a pattern: {os.path.join(path, '*.tar')!r}."
        )
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"source {path!r} is no regular file; copy the shard to disk first.")
    return ObjectInfo(status.st_size)


def open_local(path: str, expected: ObjectInfo | None) -> BinaryIO:
    """Returns a local shard, opened for reading.

    Raises:
      ShardUnavailableError: if it cannot be opened.
      ShardChangedError: if it has another length than expected.
    """
    try:
        file = open(path, "rb", buffering=BUFFER_BYTES)
    except OSError as error:
        raise _unavailable(path, error) from error
    if expected is not None and (found := os.fstat(file.fileno()).st_size) != expected.num_bytes:
        file.close()
        raise ShardChangedError(
            f"shard {path!r} has {found:,} bytes, but {expected.num_bytes:,} when the source was "
            "made. Make the source anew, and do not write to shards while they are read.",
            shard=path,
        )
    return file


def _unavailable(path: str, error: OSError) -> ShardUnavailableError:
    """Returns the error for a shard that cannot be opened, with the reason."""
    return ShardUnavailableError(
        f"cannot open shard {path!r}: {error.strerror or error}. Training would go on without its "
        "examples; restore it or take it out of the source.",
        shard=path,
    )
