"""Where shards lie: local disk, object stores, web servers, the Hugging Face Hub.

`Storage` is the only door to files: which addresses are read, how they are opened, what is retried.
"""

from jest_stream.storage.addresses import MAX_SHARDS, check, scheme_of
from jest_stream.storage.failures import failure_of
from jest_stream.storage.redaction import redacted
from jest_stream.storage.retry import Patience
from jest_stream.storage.storage import Storage
from jest_stream.storage.writing import NewFile, folder_address

__all__ = [
    "MAX_SHARDS",
    "NewFile",
    "Patience",
    "Storage",
    "check",
    "failure_of",
    "folder_address",
    "redacted",
    "scheme_of",
]
