"""Reads and writes files on local disk, in object stores, on web servers and on the Hub.

All other rooms go through `Storage`: it expands and checks addresses, opens, retries and caches.
"""

from jest_stream.storage.addresses import MAX_SHARDS, check_address, scheme_of
from jest_stream.storage.failures import failure_of
from jest_stream.storage.redaction import redacted
from jest_stream.storage.retry import RetryBudget
from jest_stream.storage.storage import Storage
from jest_stream.storage.writing import NewFile, folder_address

__all__ = [
    "MAX_SHARDS",
    "NewFile",
    "RetryBudget",
    "Storage",
    "check_address",
    "failure_of",
    "folder_address",
    "redacted",
    "scheme_of",
]
