"""Reads a streaming `datasets.IterableDataset` shard by shard, as `datasets` reads it.

In: an `IterableDataset`. Out: examples with undecoded images. Resumes by position within a shard:
`datasets` reads the shard from its start and passes over the examples before, undecoded. No threads
of ours.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.torch_version import TorchVersion

from jest_stream.errors import BadExampleError, ConfigError, UnsafeDataError
from jest_stream.sources.fields import example_of, fields_of, fields_of_row
from jest_stream.types import Example, Source

# Steps that give the same examples shard by shard as over the whole. Others (take, skip, repeat,
# interleave) do not: `skip(7)` would be dealt out over the shards instead of ending in the first.
_PER_SHARD = frozenset(
    "NoneType ExamplesIterable ArrowExamplesIterable RebatchedArrowExamplesIterable "
    "SelectColumnsIterable TypedExamplesIterable MappedExamplesIterable FilteredExamplesIterable "
    "FormattedExamplesIterable VerticallyConcatenatedMultiSourcesExamplesIterable".split()
)


class StreamSource(Source):
    """Reads the shards of a `datasets.IterableDataset`; one where its steps cannot be split.

    Args:
      dataset: the dataset, neither shuffled nor split by node.
      image_key: column of the images; None to find it.
      text_key: column of the texts, likewise.

    Raises:
      ConfigError: if the columns cannot be told, the dataset is empty, shuffled, or split by node.
      UnsafeDataError: if `datasets` would read its tars with a torch before 2.6.
    """

    def __init__(self, dataset: Any, *, image_key: str | None, text_key: str | None) -> None:
        _check_order(dataset)
        _check_reader(dataset)
        is_splittable = _kinds(dataset) <= _PER_SHARD
        self._num_shards = int(dataset.num_shards) if is_splittable else 1
        dataset = dataset.with_format(None)
        features = dataset.features
        self._name = _name_of(dataset)
        # There are two cases: 1. no schema, as of a generator: the first row tells the columns.
        # 2. A schema: it tells them, and only the columns that are needed are read.
        if features is None:
            row = next(iter(dataset.take(1)), None)
            if row is None:
                raise ConfigError(f"{self._name} is empty.")
            self._fields = fields_of_row(row, image_key, text_key, self._name)
        else:
            self._fields = fields_of(features.arrow_schema, image_key, text_key, self._name)
            dataset = _undecoded(dataset.select_columns(list(self._fields.columns)))
        self._dataset = dataset
        known = f"{self._name}|{self._num_shards}|{features}|{dataset.split}"
        self._fingerprint = hashlib.blake2b(known.encode(), digest_size=16).hexdigest()

    @property
    def num_shards(self) -> int:
        """Shards of the dataset; 1 if its shards alone give other examples."""
        return self._num_shards

    @property
    def fingerprint(self) -> str:
        """Name, split, columns and number of shards: their content is not known."""
        return self._fingerprint

    def shard_name(self, shard: int) -> str:
        """Returns the name of the dataset and the number of the shard."""
        return f"{self._name}, shard {shard} of {self.num_shards}"

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields the examples after the first `index` of the shard; see `types.Source`."""
        del offset
        name = self.shard_name(shard)
        # Always a new dataset: `_after` sets its state.
        part = self._dataset.with_format(None)
        if self._num_shards > 1:
            part = part.shard(num_shards=self._num_shards, index=shard)
        rows = iter(_after(part, index))
        try:
            for row in rows:
                example = example_of(
                    row, self._fields, key=f"{shard}/{index}", shard=name, opens_paths=True
                )
                index += 1
                yield example, index
        finally:
            rows.close()

    def __repr__(self) -> str:
        return f"<StreamSource {self.num_shards} shards | {self._name}>"


def _after(part: Any, index: int) -> Any:
    """Returns a dataset without its first `index` examples."""
    if index == 0:
        return part
    state = part.state_dict()
    plain = state["examples_iterable"]
    is_count = set(plain) == {"shard_idx", "shard_example_idx", "type"}
    if is_count and plain["type"] == "ExamplesIterable" and part.num_shards == 1:
        # Its state is a count of examples and no more: they are passed over before any is made.
        plain["shard_example_idx"] = index
        part.load_state_dict(state)
        return part
    return part.skip(index)


def _undecoded(dataset: Any) -> Any:
    """Returns the dataset with images as the bytes that they are stored as."""
    datasets = importlib.import_module("datasets")
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image) and feature.decode:
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _check_order(dataset: Any) -> None:
    """Refuses a dataset whose order resuming could not go back to."""
    shuffled = sorted(kind for kind in _kinds(dataset) if "Shuffle" in kind)
    if shuffled or getattr(dataset, "_shuffling", None) is not None:
        raise ConfigError(
            "the dataset was shuffled with .shuffle(), whose buffer no checkpoint holds: resuming "
            "would lose its examples. Pass it as it was before; shards are shuffled and mixed "
            "here, by seed."
        )
    if getattr(dataset, "_distributed", None) is not None:
        raise ConfigError(
            "the dataset was split by split_dataset_by_node, so that each rank has another part. "
            "Pass the whole dataset on every rank; its shards are dealt to the ranks here."
        )


def _check_reader(dataset: Any) -> None:
    """Refuses tars read by `datasets` where reading them can run a stranger's code."""
    is_old = TorchVersion(torch.__version__) < TorchVersion("2.6")
    if is_old and dataset.info.builder_name == "webdataset":
        raise UnsafeDataError(
            "the dataset is one of tars, of which datasets opens every .pth member by torch.load; "
            "that can run a stranger's code (CVE-2025-32434) with torch before 2.6, here "
            f"{torch.__version__}. Upgrade torch; or pass hf://datasets/org/name or the paths of "
            "the tars, which are read here, without opening such members."
        )


def _kinds(dataset: Any) -> set[str]:
    """Returns the names of the steps that a dataset goes through."""
    # A step holds the steps before it as attributes, alone or in a list: interleaving has several.
    waiting, kinds = [getattr(dataset, "_ex_iterable", None)], set()
    while waiting:
        step = waiting.pop()
        kinds.add(type(step).__name__)
        for value in vars(step).values() if hasattr(step, "__dict__") else ():
            listed = value if isinstance(value, list) else [value]
            waiting += [item for item in listed if type(item).__name__.endswith("Iterable")]
    return kinds


def _name_of(dataset: Any) -> str:
    info = dataset.info
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None) or "stream"
    config = getattr(info, "config_name", None)
    return f"dataset {name}" + (f" ({config})" if config and config != "default" else "")
