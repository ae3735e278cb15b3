"""`TarSource` races s3fs + tarfile: encoded examples per second from a real S3 server on loopback.

    python tests/benchmarks/bench_s3.py [--shards 8] [--examples 1000] [--rounds 7]

The server is SeaweedFS, started and ended here. Rounds alternate between the two, so that noise of
the machine hits both; medians and the median of the paired ratios are printed as a Markdown table.
s3fs + tarfile is what a careful user writes: `fs.open` with s3fs's own read-ahead of 5 MiB or with
one of 32 MiB, streamed through `tarfile.open(mode="r|")`, members grouped by key.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.s3_server import S3Server  # noqa: E402
from support.shards import write_shards  # noqa: E402

from jest_stream.sources.tar import TarSource  # noqa: E402


def ours(source: TarSource) -> Iterator[dict[str, Any]]:
    """Yields examples, one shard after the other."""
    for shard in range(source.num_shards):
        for example, _ in source.read(shard):
            assert isinstance(example, dict)
            yield example


def theirs(files: Any, urls: list[str], block_bytes: int) -> Iterator[dict[str, Any]]:
    """Yields the same examples by s3fs and tarfile."""
    for url in urls:
        example: dict[str, Any] = {}
        with (
            files.open(url, "rb", block_size=block_bytes) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            for member in archive:
                key, _, extension = member.name.partition(".")
                if key != example.get("__key__"):
                    if example:
                        yield example
                    example = {"__key__": key}
                data = archive.extractfile(member)
                assert data is not None
                example[extension] = data.read()
        if example:
            yield example


def seconds(examples: Iterator[Any]) -> tuple[float, int]:
    """Returns how long it took to get all examples, and how many there were."""
    start = time.perf_counter()
    count = sum(1 for _ in examples)
    return time.perf_counter() - start, count


def compare(
    name: str, rounds: int, our: Callable[[], Any], their: Callable[[], Any], num_bytes: int
) -> float:
    """Prints a row with the medians of both and returns the median of the paired ratios."""
    num_examples = seconds(our())[1]
    assert seconds(their())[1] == num_examples
    pairs = [(seconds(our())[0], seconds(their())[0]) for _ in range(rounds)]
    our_s, their_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = [b / a for a, b in pairs]
    print(
        f"| {name} | {num_examples / our_s:,.0f} | {num_examples / their_s:,.0f} "
        f"| {num_bytes / our_s / 2**20:,.0f} | {num_bytes / their_s / 2**20:,.0f} "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
        flush=True,
    )
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--examples", type=int, default=1000, help="per shard")
    parser.add_argument("--size", type=int, default=96, help="of an image, in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--paths", nargs="*", help="local shards to serve instead of drawn ones")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import s3fs

    with tempfile.TemporaryDirectory() as folder:
        paths = arguments.paths or write_shards(
            Path(folder) / "shards",
            num_shards=arguments.shards,
            examples_per_shard=arguments.examples,
            size=arguments.size,
        )
        num_bytes = sum(Path(path).stat().st_size for path in paths)
        server = S3Server(Path(folder) / "server")
        server.start()
        try:
            bucket = server.put_files(paths)
            urls = [f"{bucket}/{Path(path).name}" for path in paths]
            files = s3fs.S3FileSystem(**server.options["s3"], skip_instance_cache=True)
            source = TarSource(urls, storage=server.config)
            print(f"{len(urls)} shards, {num_bytes / 2**20:.0f} MiB, {arguments.rounds} rounds\n")
            print(
                "| beside s3fs + tarfile | ours/s | theirs/s | ours MiB/s | theirs MiB/s | ratio |"
            )
            print("|-|-:|-:|-:|-:|-:|")
            for name, block_bytes in (("blocks of 5 MiB", 5 << 20), ("blocks of 32 MiB", 32 << 20)):
                compare(
                    name,
                    arguments.rounds,
                    lambda: ours(source),
                    lambda block=block_bytes: theirs(files, urls, block),
                    num_bytes,
                )
            source.close()
        finally:
            server.kill()


if __name__ == "__main__":
    main()
