"""`on_ranks` runs a test's work on real ranks: processes that meet over gloo.

    first, second = on_ranks(2, tmp_path, work, shards)  # what work(shards) returned on each

They are forked, so that none of them has to import torch again. An error on one is raised
here, and nothing may survive on any.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed
import torch.multiprocessing

from support.leaks import nothing_left_behind


def on_ranks(world_size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Runs `work(*arguments)` on each rank; returns what they found, which passes through `folder`.

    Within `work`, `torch.distributed.get_rank()` tells the rank.
    """
    (folder / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.start_processes(
        _run, args=(world_size, folder, work, arguments), nprocs=world_size, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run(
    rank: int, world_size: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=30),
    )
    try:
        with nothing_left_behind():
            found = work(*arguments)
        torch.save(found, folder / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
