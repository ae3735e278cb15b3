"""Where shards lie: local disk, object stores, web servers, the Hugging Face Hub.

`Storage` is the only door to files: which addresses are read, how they are opened, what is retried.
"""

from jest_stream.storage.redaction import redacted
from jest_stream.storage.settings import ObjectInfo, StorageConfig
from jest_stream.storage.storage import Storage
from jest_stream.storage.writing import NewFile, folder_address

__all__ = [
    "NewFile",
    "ObjectInfo",
    "Storage",
    "StorageConfig",
    "folder_address",
    "redacted",
]
