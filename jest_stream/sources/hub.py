"""Finds the files that hold a split in a repository of the Hugging Face Hub, at one commit.

In: `org/name`, a split, perhaps a configuration and a revision. Out: the tars or Parquet files that
`datasets` would read for it, in its order, with their sizes. The rules are those of `datasets` (the
README's `configs`, else the names of files and folders), applied to one listing of the repository.
Runs in the training process; nothing of a repository is ever executed.

The listing is made here, not by `datasets.load_dataset_builder`: that reads one Hub per process
(`HF_ENDPOINT`), follows a README's patterns to other servers and to local files before we see them,
and its requests, as those of `HfApi.list_repo_tree`, have no time limit.
"""

from __future__ import annotations

import hashlib
import importlib
import random
import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from jest_stream.config import StorageConfig
from jest_stream.errors import ConfigError, ShardUnavailableError, UnsafeDataError
from jest_stream.storage import MAX_SHARDS, RetryBudget, failure_of, redacted
from jest_stream.types import ObjectInfo

_ADDRESS = re.compile(r"(?:(?i:hf)://datasets/)?([^/@\s]+/[^/@\s]+?)(?:@([^\s]+?))?/?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_README_BYTES = 8 << 20
_KINDS: dict[str, Literal["tar", "parquet"]] = {".tar": "tar", ".parquet": "parquet"}
# Other files that `datasets` takes for data: where they prevail, a split is not tars.
_OTHER_DATA = re.compile(r"\.(csv|tsv|jsonl?|arrow|txt|xml|zip|jpe?g|png|webp|gif|wav|mp3|mp4|h5)$")


class HubFiles(NamedTuple):
    """The data files of one split."""

    repository: str
    """`org/name`."""
    commit: str
    """The commit that all are read at."""
    kind: Literal["tar", "parquet"]
    """Format of all of them."""
    paths: list[str]
    """Their paths in the repository, in order."""
    infos: list[ObjectInfo]
    """The length of each, and the commit."""
    digest: str
    """Names their content: paths, lengths and object ids, not the commit."""

    @property
    def urls(self) -> list[str]:
        """The addresses, at the commit."""
        return [f"hf://datasets/{self.repository}@{self.commit}/{path}" for path in self.paths]


def parse_repository(address: str) -> tuple[str, str | None] | None:
    """Returns `org/name` and the revision of a repository's address; None if it is another.

    >>> parse_repository("hf://datasets/org/name@v1")
    ('org/name', 'v1')
    """
    found = _ADDRESS.fullmatch(address)
    if not found:
        return None
    name, revision = found.groups()
    if revision is not None and "/" in revision and not revision.startswith("refs/"):
        return None  # a file: hf://datasets/org/name@revision/path
    return name, revision


def find_files(
    repository: str,
    *,
    split: str,
    config: str | None,
    revision: str | None,
    storage: StorageConfig,
) -> HubFiles:
    """Returns the data files of a split.

    Raises:
      ConfigError: if there is no such repository, revision, configuration or split, it may not be
        read, or it holds no tars or Parquet files; with the choices that exist.
      ShardUnavailableError: if the Hub cannot be reached.
    """
    api = _Api(repository, storage)
    commit = api.commit(revision)
    files = api.list_files(commit)
    # A script of the repository's name is run by releases of `datasets` before 4.0.
    script = f"{repository.partition('/')[2]}.py"
    if script in files:
        raise ConfigError(
            f"hf://datasets/{repository} is read by a script of its own ({script}), a stranger's "
            "code, which is never run here. Ask its owners for Parquet files or tars, or see "
            'whether the Hub converted it: revision="refs/convert/parquet".'
        )
    card = api.card(commit) if "README.md" in files else None
    patterns, folder = _patterns_of(repository, card, config, list(files))
    if split not in patterns:
        raise ConfigError(
            f"hf://datasets/{repository} has no split {split!r}; it has "
            f"{', '.join(map(repr, patterns)) or 'none'}. Pass split=... (a slice such as "
            "'train[:10%]' is not read)."
        )
    found = dict.fromkeys(
        path for pattern in patterns[split] for path in _matching(pattern, folder, files)
    )
    kind, paths = _of_one_kind(repository, split, list(found))
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(f"{path}\0{files[path].num_bytes}\0{files[path].version}\n".encode())
    return HubFiles(
        repository,
        commit,
        kind,
        paths,
        [ObjectInfo(files[path].num_bytes, commit) for path in paths],
        digest.hexdigest(),
    )


class _Api:
    """Asks the Hub about one repository; repeats requests within the storage's time limits."""

    def __init__(self, repository: str, storage: StorageConfig) -> None:
        # Its submodules are attributes of the package only once they have been imported.
        constants = importlib.import_module("huggingface_hub.constants")
        self._utils = importlib.import_module("huggingface_hub.utils")
        self._hub = importlib.import_module("huggingface_hub")
        options = storage.options.get("hf", {})
        self._repository = repository
        self._storage = storage
        self._has_token = bool(options.get("token") or self._hub.get_token())
        self._endpoint = str(options.get("endpoint") or constants.ENDPOINT).rstrip("/")
        self._headers = self._utils.build_hf_headers(token=options.get("token"))

    def commit(self, revision: str | None) -> str:
        """Returns the commit that a revision stands for now."""
        path = f"/api/datasets/{self._repository}"
        if revision is not None:
            path += f"/revision/{quote(revision, safe='')}"
        commit = str(self._get(path, revision).json().get("sha", ""))
        if not _COMMIT.fullmatch(commit):
            raise ShardUnavailableError(
                f"{self._endpoint} answered no commit for {self._repository!r}. Is it a Hugging "
                "Face Hub? Correct HF_ENDPOINT.",
                shard=f"hf://datasets/{self._repository}",
            )
        return commit

    def list_files(self, commit: str) -> dict[str, ObjectInfo]:
        """Returns length and object id of every file at a commit, by path."""
        url: str | None = f"/api/datasets/{self._repository}/tree/{commit}?recursive=true"
        files: dict[str, ObjectInfo] = {}
        # The listing comes in pages; each but the last names the address of the next.
        while url is not None:
            answer = self._get(url, commit)
            for entry in answer.json():
                if entry["type"] == "file":
                    oid = (entry.get("lfs") or {}).get("oid") or entry.get("oid", "")
                    files[str(entry["path"])] = ObjectInfo(int(entry["size"]), str(oid))
            if len(files) > MAX_SHARDS:
                raise UnsafeDataError(
                    f"hf://datasets/{self._repository} holds more than {MAX_SHARDS:,} files. Name "
                    "its shards: hf://datasets/org/name/folder/*.tar."
                )
            following = answer.links.get("next", {}).get("url")
            url = None if following is None else self._own(following)
        return files

    def card(self, commit: str) -> Any:
        """Returns the `DatasetCardData` at the head of the README; None without one."""
        path = f"/datasets/{self._repository}/resolve/{commit}/README.md"
        text = self._get(path, commit).text[:_MAX_README_BYTES]
        if not text.lstrip("\ufeff").startswith("---"):
            return None
        return self._hub.DatasetCard(text, ignore_metadata_errors=True).data

    def _own(self, url: str) -> str:
        """Returns the path of an address on the same server: the token goes nowhere else."""
        if not url.startswith(self._endpoint + "/"):
            raise UnsafeDataError(
                f"{self._endpoint} refers to {redacted(url)} for the rest of a listing, which is "
                "another server; the token is not sent there."
            )
        return url[len(self._endpoint) :]

    def _get(self, path: str, revision: str | None) -> Any:
        """Returns an answer that is no error, trying again where that can help."""
        shard = f"hf://datasets/{self._repository}"
        budget = RetryBudget(shard, self._storage, random.Random())
        utils = self._utils
        # requests or httpx, by the version of huggingface_hub; their errors are its bases.
        expected = (OSError, *utils.HfHubHTTPError.__bases__)
        while True:
            budget.attempts += 1
            try:
                answer = utils.get_session().get(
                    self._endpoint + path,
                    headers=self._headers,
                    timeout=self._storage.connect_timeout_s + self._storage.stall_timeout_s,
                )
                utils.hf_raise_for_status(answer)
                return answer
            except expected as error:
                failure = failure_of(error)
                if failure.status in (401, 403, 404):
                    raise self._refused(error, failure.status, revision) from error
                pause_s = budget.pause_after(failure)
            time.sleep(pause_s)

    def _refused(self, error: Exception, status: int, revision: str | None) -> ConfigError:
        """Returns the error in words for a request that the Hub refused."""
        # There are four cases, the narrow ones first, since the Hub answers 404 or 401 to most:
        # 1. A gated repository: everybody sees it, its files take a permission.
        # 2. No such revision.
        # 3. No such repository, or a private one: the Hub does not say which.
        # 4. Any other refusal, such as a token without the right to read.
        utils, name = self._utils, f"hf://datasets/{self._repository}"
        who = "with the token in use" if self._has_token else "without a token, and none was found"
        log_in = "Log in with `hf auth login`, set HF_TOKEN, or pass token=..."
        if isinstance(error, utils.GatedRepoError):
            return ConfigError(
                f"{name} is gated: its owners want to be asked, and it was asked for {who} (HTTP "
                f"status {status}). Ask for access on {self._endpoint}/datasets/"
                f"{self._repository}. {log_in}"
            )
        if isinstance(error, utils.RevisionNotFoundError):
            return ConfigError(
                f"{name} has no revision {revision!r}. Pass a branch, a tag or a commit, or none "
                "for the main branch."
            )
        if status == 404 or isinstance(error, utils.RepositoryNotFoundError):
            return ConfigError(
                f"{name} does not exist, or is private: it was asked for {who} (HTTP status "
                f"{status}). Check the name. If it is private: {log_in}"
            )
        return ConfigError(f"{name} may not be read {who} (HTTP status {status}). {log_in}")


def _patterns_of(
    repository: str, card: Any | None, config: str | None, paths: list[str]
) -> tuple[dict[str, list[str]], str]:
    """Returns the patterns of each split, and the folder that they are relative to."""
    datasets = importlib.import_module("datasets.data_files")
    metadata = importlib.import_module("datasets.utils.metadata").MetadataConfigs
    try:
        configs: Any = metadata.from_dataset_card_data(card) if card else metadata()
        default = configs.get_default_config_name() if configs else None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"the README of hf://datasets/{repository} has `configs` that cannot be read ({error})."
        ) from error
    # The configuration is 1. the user's; 2. the README's default; 3. the only one.
    names = list(configs) or ["default"]
    chosen = config or default or (names[0] if len(names) == 1 else None)
    if chosen not in names:
        fault = f"no configuration {config!r}" if config else "several configurations"
        raise ConfigError(
            f"hf://datasets/{repository} has {fault}: {', '.join(map(repr, names))}. Pass "
            "config=..., one of these."
        )
    entry = configs[chosen] if configs else {}
    folder = str(entry.get("data_dir") or "").strip("/")
    if entry.get("data_files") is not None:
        patterns: dict[str, list[str]] = datasets.sanitize_patterns(entry["data_files"])
        return {str(split): list(map(str, listed)) for split, listed in patterns.items()}, folder
    return _default_patterns(repository, folder, paths), folder


def _default_patterns(repository: str, folder: str, paths: list[str]) -> dict[str, list[str]]:
    """Returns the patterns of each split of a repository whose README names none.

    `datasets` tries its sets of patterns one after the other and takes the first that finds a file:
    `data/SPLIT-00000-of-00003.EXTENSION`, then names and folders that hold `train`, `test`, ...,
    then every file for `train`.
    """
    datasets = importlib.import_module("datasets.data_files")
    try:
        # Not public, but the order is nowhere else: `get_data_patterns` lists files by itself.
        found = datasets._get_data_files_patterns(lambda one: _matching(one, folder, paths))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(
            f"the names of the files of hf://datasets/{repository} give no splits: {error} Name "
            "the files of each split in the README's `configs`, or ask its owners to."
        ) from error
    return {str(split): list(patterns) for split, patterns in found.items()}


def _matching(pattern: str, folder: str, paths: Iterable[str]) -> list[str]:
    """Returns the files of a repository that a pattern of `datasets` means, sorted."""
    from fsspec.utils import glob_translate

    if "://" in pattern or "::" in pattern or pattern.startswith(("/", "../")):
        raise ConfigError(
            f"the README names data outside of the repository ({redacted(pattern)!r}), which is "
            "not read. Pass that address instead."
        )
    whole = "/".join(part for part in (folder, pattern.removeprefix("./")) if part)
    expression = re.compile(glob_translate(whole))
    ignored = importlib.import_module("datasets.data_files").FILES_TO_IGNORE
    return sorted(
        path
        for path in paths
        if expression.match(path)
        and PurePosixPath(path).name not in ignored
        and _num_hidden(path) == _num_hidden(whole)
    )


def _num_hidden(path: str) -> tuple[int, int]:
    """Counts parts that begin with a dot, and folders that begin with two underscores.

    A pattern must ask for them: `**` does not match `.git/x.tar`, `.git/*` does.
    """
    parts = PurePosixPath(path).parts
    return sum(part.startswith(".") for part in parts), sum(
        part.startswith("__") for part in parts[:-1]
    )


def _of_one_kind(
    repository: str, split: str, paths: list[str]
) -> tuple[Literal["tar", "parquet"], list[str]]:
    """Returns the kind of file that a split consists of, and those files."""
    suffixes = Counter(PurePosixPath(path).suffix.lower() for path in paths if _is_data(path))
    common = [suffix for suffix, _ in suffixes.most_common()]
    if not common or common[0] not in _KINDS:
        held = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
        raise ConfigError(
            f"split {split!r} of hf://datasets/{repository} consists of {held or 'no data files'}; "
            "read are .tar and .parquet. Pass datasets.load_dataset(..., streaming=True) as the "
            'source, or see whether the Hub converted it: revision="refs/convert/parquet".'
        )
    chosen = [path for path in paths if path.lower().endswith(common[0])]
    for path in chosen:
        if re.search(r"[*?\[\]{}\x00-\x1f]", path):
            raise ConfigError(
                f"{path!r} of hf://datasets/{repository} has a name that means a pattern here. "
                "Rename it, or ask its owners to."
            )
    return _KINDS[common[0]], chosen


def _is_data(path: str) -> bool:
    return path.lower().endswith(tuple(_KINDS)) or bool(_OTHER_DATA.search(path.lower()))
