"""The settings, frozen and checked once.

`selection` says how sub-batches are chosen, `scoring` how candidates are embedded, `stream` the
rest of what `JESTDataset` was given; `checks` are shared by all.
"""

from jest_stream.config.checks import (
    as_device,
    as_integer,
    as_number,
    finite,
    require_bool,
    require_functions,
    require_key,
    require_one_of,
)
from jest_stream.config.limits import DEFAULT_LIMITS, Limits
from jest_stream.config.presets import preset
from jest_stream.config.scoring import ScoringConfig, require_scoring
from jest_stream.config.selection import (
    Loss,
    Metadata,
    Method,
    Quota,
    ScoreFunction,
    SelectionConfig,
    TargetSimilarity,
    Term,
    require_quotas,
    require_rule,
    require_sampling,
)
from jest_stream.config.sizes import FilterRatio, Layout, Sizes, quota_sizes, resolve_sizes
from jest_stream.config.storage import SCHEMES, StorageConfig
from jest_stream.config.stream import OnBadExample, OnBadShard, StreamConfig

__all__ = [
    "DEFAULT_LIMITS",
    "Limits",
    "FilterRatio",
    "Layout",
    "Loss",
    "Metadata",
    "Method",
    "OnBadExample",
    "OnBadShard",
    "Quota",
    "SCHEMES",
    "ScoreFunction",
    "ScoringConfig",
    "SelectionConfig",
    "Sizes",
    "StorageConfig",
    "StreamConfig",
    "TargetSimilarity",
    "Term",
    "as_device",
    "as_integer",
    "as_number",
    "finite",
    "preset",
    "quota_sizes",
    "require_bool",
    "require_functions",
    "require_key",
    "require_one_of",
    "require_quotas",
    "require_rule",
    "require_sampling",
    "require_scoring",
    "resolve_sizes",
]
