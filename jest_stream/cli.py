"""Runs the command line: `jest-stream demo`, `jest-stream index`, `jest-stream cache`.

The exit status is 0 on success only, 1 on an error of this package (its message on standard error),
2 on a wrong command line, 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jest_stream.errors import JESTError

_DEMO = """\
Train on real icons with and without selection, and compare. A small image-text model is trained
twice, on uniform batches and on jointly selected ones; the two are compared at equal steps, equal
FLOPs and equal wall time.

example:
  jest-stream demo --steps 400 --seed 1 --out my_demo
"""

_INDEX = """\
Count the examples of tar shards and write a manifest. It then serves as the source: with counts,
repeat=False works on several ranks, and a shard that was cut is noticed.

example:
  jest-stream index "pairs-{00000..00999}.tar" --out sizes.json
"""

_CACHE = """\
Embed every example of a source once with a reference model. Training then reads the embeddings
instead of running the model. A build that was stopped goes on where it was; several processes share
the work under torchrun.

examples:
  jest-stream cache "pairs-{00000..00999}.tar" --reference open_clip:ViT-B-32/laion2b_s34b_b79k \\
      --out s3://bucket/reference-cache --device cuda --dtype bfloat16 --num-workers 8
  torchrun --nproc-per-node 8 -m jest_stream.cli cache "pairs-*.tar" --reference my_model \\
      --out cache --device cuda
"""

_SOURCE = "shards: paths, patterns or addresses"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except JESTError as error:
        print(f"jest-stream: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jest-stream: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jest-stream",
        description="Joint example selection. Examples: jest-stream COMMAND --help",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def _add(name: str, run: Callable[[argparse.Namespace], None], description: str) -> Any:
        command = commands.add_parser(
            name,
            help=description.partition(".")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    _add_demo_options(_add("demo", _demo, _DEMO))
    _add_index_options(_add("index", _index, _INDEX))
    _add_cache_options(_add("cache", _cache, _CACHE))
    return parser


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "--steps", type=int, default=None, help="training steps of each run (default 400)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of the model and the data (default 0)")
    demo.add_argument("--out", type=Path, default=Path("jest_demo"), help="folder for the results")
    demo.add_argument("--device", default="cpu", help="where to train (default cpu)")
    demo.add_argument(
        "--filter-ratio", type=float, default=0.8, help="share of candidates to drop (default 0.8)"
    )


def _add_index_options(index: argparse.ArgumentParser) -> None:
    index.add_argument("source", nargs="+", help=_SOURCE)
    index.add_argument("--out", type=Path, required=True, help="the manifest, a .json file")


def _add_cache_options(cache: argparse.ArgumentParser) -> None:
    cache.add_argument("source", nargs="+", help=_SOURCE)
    cache.add_argument(
        "--reference",
        required=True,
        help="open_clip:NAME[/TAG], open_clip:NAME/FILE.safetensors, or a folder with "
        "open_clip_config.json and open_clip_model.safetensors",
    )
    cache.add_argument("--out", required=True, help="a folder, or an s3:// or gs:// address")
    cache.add_argument("--num-workers", type=int, default=0, help="processes that read (default 0)")
    cache.add_argument(
        "--micro-batch-size", type=int, default=256, help="examples per pass (default 256)"
    )
    cache.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="embed under autocast in a shorter type (default float32: the model's own)",
    )
    cache.add_argument(
        "--device", default="cpu", help="where to embed; cuda is each rank's own (default cpu)"
    )
    cache.add_argument("--image-key", default=None, help="member that holds the image")
    cache.add_argument("--text-key", default=None, help="member that holds the text")
    cache.add_argument(
        "--on-bad-example",
        choices=("raise", "skip"),
        default="raise",
        help="skip leaves out and counts examples that cannot be read (default raise)",
    )


def _cache(options: argparse.Namespace) -> None:
    import torch

    from jest_stream.config import DEFAULT_IMAGE_KEY, DEFAULT_TEXT_KEY
    from jest_stream.errors import IncompleteCacheError
    from jest_stream.reference_cache import ReferenceCache

    # torchrun numbers the processes of a machine: each takes the GPU of its number, unless the
    # user named one.
    device, local_rank = options.device, os.environ.get("LOCAL_RANK")
    if device == "cuda" and local_rank is not None:
        device = f"cuda:{local_rank}"
    source = options.source[0] if len(options.source) == 1 else options.source
    with ReferenceCache.build(
        source,
        options.reference,
        options.out,
        image_key=options.image_key or DEFAULT_IMAGE_KEY,
        text_key=options.text_key or DEFAULT_TEXT_KEY,
        num_workers=options.num_workers,
        micro_batch_size=options.micro_batch_size,
        autocast_dtype=None if options.dtype == "float32" else getattr(torch, options.dtype),
        device=device,
        on_bad_example=options.on_bad_example,
        show_progress=True,
    ) as cache:
        try:
            print(cache.summary())
        except IncompleteCacheError as incomplete:  # other ranks are still at work
            print(
                f"{options.out}: this process has done its shards; {incomplete.num_done} of "
                f"{incomplete.num_shards} are done in all"
            )


def _index(options: argparse.Namespace) -> None:
    from jest_stream.sources import TarSource, write_manifest

    source = TarSource(options.source)
    try:
        write_manifest(source, options.out)
    finally:
        source.close()
    # Read back as the source that it is for: a manifest that cannot be used is noticed now.
    counts = TarSource(options.out).num_examples or []
    print(f"{options.out}: {len(counts):,} shards, {sum(counts):,} examples")


def _demo(options: argparse.Namespace) -> None:
    from jest_stream.demo import run_demo

    run_demo(
        steps=options.steps,
        seed=options.seed,
        out=options.out,
        device=options.device,
        filter_ratio=options.filter_ratio,
    )


if __name__ == "__main__":
    sys.exit(main())
