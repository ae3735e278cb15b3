"""What `reference=` stands for: a module, a model's name, or a cache of embeddings.

Decides which; `scoring` loads models, `caching` opens caches. A model that was named brings its own
transform and tokenizer; a cache was made with its own, so that examples need no second view.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from torch import nn

from jest_stream.caching import ReferenceCache
from jest_stream.errors import ConfigError
from jest_stream.scoring.named import is_named, load_reference
from jest_stream.storage import StorageConfig
from jest_stream.storage.addresses import check, scheme_of
from jest_stream.views import Key, Transform


class OpenReference(NamedTuple):
    """A reference, and how it is shown the examples."""

    model: nn.Module | ReferenceCache | None
    transform: Transform | None
    """The reference's own view; None: it shares the learner's, or needs none."""
    tokenizer: Transform | None
    is_own: bool
    """Whether it was opened here, and is to be closed with the dataset."""


def open_reference(
    reference: Any,
    *,
    transform: Transform | None,
    tokenizer: Transform | None,
    keys: tuple[Key, Key],
    storage: StorageConfig | None,
) -> OpenReference:
    """Returns the reference that `reference` stands for.

    Args:
      reference: a module, a `ReferenceCache`, the address of one, the name of a model (see
        `scoring.named`), or None.
      transform: what the user gave as the reference's own. With a cache it says what the cache
        must have been built with.
      tokenizer: likewise.
      keys: where an example's image and text are.
      storage: how a cache is read.

    Raises:
      ConfigError: for what is none of these.
      ReferenceMismatchError: for a cache that was built with other views.
    """
    is_own = isinstance(reference, str | os.PathLike)
    if is_own and is_named(reference):
        named = load_reference(reference)
        return OpenReference(
            named.module, transform or named.transform, tokenizer or named.tokenizer, is_own
        )
    if is_own:
        address = check(os.fspath(reference))
        if not scheme_of(address) and not os.path.exists(address):
            raise ConfigError(
                f"reference={os.fspath(reference)!r} is no folder of a reference cache, no model "
                f"folder, and no name such as 'open_clip:ViT-B-32/laion2b_s34b_b79k'. A cache is "
                f"built with jest-stream cache SOURCE --reference NAME --out {os.fspath(reference)}"
            )
        reference = ReferenceCache(reference, storage=storage)
    if isinstance(reference, ReferenceCache):
        expected = {"transform": transform, "tokenizer": tokenizer}
        reference.check({name: view for name, view in expected.items() if view is not None})
        reference.check_keys(*keys)
        return OpenReference(reference, None, None, is_own)
    return OpenReference(reference, transform, tokenizer, False)
