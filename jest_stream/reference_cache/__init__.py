"""Makes the reference embeddings of a whole source once, and reads them in step with its shards.

`build` embeds a source, shard by shard, into Arrow files beside a manifest; `cache` opens them;
`join` adds to each example its embeddings while its shard is read.
"""

from jest_stream.reference_cache.cache import ReferenceCache

__all__ = [
    "ReferenceCache",
]
