"""Holds every setting, frozen and checked when it is made.

Users make `SelectionConfig`, `ScoringConfig`, `StorageConfig` and `Limits`. `JESTDataset` makes the
other configs from its arguments, and puts all of them into `RunSettings`. `checks.py` holds the
checks that the configs share.
"""

from jest_stream.config.checks import (
    as_config,
    as_device,
    as_integer,
    as_number,
    require_one_of,
)
from jest_stream.config.presets import preset
from jest_stream.config.run import (
    BatchConfig,
    OnBadExample,
    OnBadShard,
    RunSettings,
    StreamConfig,
)
from jest_stream.config.scoring import ScoringConfig
from jest_stream.config.selection import (
    SCORE_NAMES,
    Loss,
    Metadata,
    Method,
    Quota,
    ScoreFunction,
    SelectionConfig,
    TargetSimilarity,
    Term,
    require_quotas,
    require_sampling,
)
from jest_stream.config.sizes import FilterRatio, Layout, Sizes, quota_sizes, resolve_sizes
from jest_stream.config.storage import SCHEMES, StorageConfig
from jest_stream.config.views import (
    DEFAULT_IMAGE_KEY,
    DEFAULT_LIMITS,
    DEFAULT_TEXT_KEY,
    Key,
    Limits,
    ReducedDecoding,
    TrainViewFrom,
    Transform,
    ViewConfig,
)

__all__ = [
    "BatchConfig",
    "DEFAULT_IMAGE_KEY",
    "DEFAULT_LIMITS",
    "DEFAULT_TEXT_KEY",
    "FilterRatio",
    "Key",
    "Layout",
    "Limits",
    "Loss",
    "Metadata",
    "Method",
    "OnBadExample",
    "OnBadShard",
    "Quota",
    "ReducedDecoding",
    "RunSettings",
    "SCHEMES",
    "SCORE_NAMES",
    "ScoreFunction",
    "ScoringConfig",
    "SelectionConfig",
    "Sizes",
    "StorageConfig",
    "StreamConfig",
    "TargetSimilarity",
    "Term",
    "TrainViewFrom",
    "Transform",
    "ViewConfig",
    "as_config",
    "as_device",
    "as_integer",
    "as_number",
    "preset",
    "quota_sizes",
    "require_one_of",
    "require_quotas",
    "require_sampling",
    "resolve_sizes",
]
