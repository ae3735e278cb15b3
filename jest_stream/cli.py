"""The command line: `jest-stream demo`, `jest-stream index`.

Exit status 0 only on success, 1 on an error of ours (its message on standard error), 2 on a wrong
command line, 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jest_stream.errors import JESTError

_DEMO = """\
Train a small image-text model on real icons and emoji twice, on uniform batches and on jointly
selected ones, and compare: at equal steps, equal FLOPs and equal wall time.

example:
  jest-stream demo --steps 400 --seed 1 --out my_demo
"""

_INDEX = """\
Count the examples of tar shards and write a manifest, which then serves as the source: with counts,
repeat=False works on several ranks, and a shard that holds less than it should is noticed.

example:
  jest-stream index "pairs-{00000..00999}.tar" --out sizes.json
"""


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
    parser = argparse.ArgumentParser(prog="jest-stream", description="Joint example selection.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train on real icons with and without selection, and compare",
        description=_DEMO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--steps", type=int, default=None, help="training steps of the JEST run")
    demo.add_argument("--seed", type=int, default=0, help="of the model and the data (default 0)")
    demo.add_argument("--out", type=Path, default=Path("jest_demo"), help="folder for the results")
    demo.add_argument("--device", default="cpu", help="where to train (default cpu)")
    demo.add_argument(
        "--filter-ratio", type=float, default=0.8, help="share of candidates to drop (default 0.8)"
    )
    demo.set_defaults(run=_demo)
    index = commands.add_parser(
        "index",
        help="count the examples of shards, and write a manifest",
        description=_INDEX,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    index.add_argument("source", nargs="+", help="shards: paths, patterns or addresses")
    index.add_argument("--out", type=Path, required=True, help="the manifest, a .json file")
    index.set_defaults(run=_index)
    return parser


def _index(options: argparse.Namespace) -> None:
    from jest_stream.sources.manifest import write_manifest
    from jest_stream.sources.tar import TarSource

    source = TarSource(options.source)
    try:
        write_manifest(source, options.out)
    finally:
        source.close()
    counts = TarSource(options.out).num_examples or []
    print(f"{options.out}: {len(counts):,} shards, {sum(counts):,} examples")


def _demo(options: argparse.Namespace) -> None:
    from jest_stream.demo.run import run_demo

    run_demo(
        steps=options.steps,
        seed=options.seed,
        out=options.out,
        device=options.device,
        filter_ratio=options.filter_ratio,
    )
