"""Reads examples from shards, which are dealt to lanes, here or in worker processes.

`open_source` turns the user's argument into a `Source`. `lanes` deals its shards, `blocks` reads
one lane, and `BlockReader` reads all lanes of a rank block by block. Examples stay encoded: the
room `views` decodes them.
"""

from jest_stream.sources.huggingface import HuggingFaceSource
from jest_stream.sources.index import write_manifest
from jest_stream.sources.iterable import IterableSource
from jest_stream.sources.lanes import lane_shards, num_lanes, shard_order
from jest_stream.sources.opening import is_source, open_source
from jest_stream.sources.reader import Block, BlockReader
from jest_stream.sources.tar import TarSource

__all__ = [
    "Block",
    "BlockReader",
    "HuggingFaceSource",
    "IterableSource",
    "TarSource",
    "is_source",
    "lane_shards",
    "num_lanes",
    "open_source",
    "shard_order",
    "write_manifest",
]
