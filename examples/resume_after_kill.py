"""Kill a training run in the middle, resume it, and see that nothing was lost or repeated.

python examples/resume_after_kill.py

Needs no data and no model: it draws four small shards. The training run is a second process, which
saves a checkpoint after each step. It is written to another name first and then renamed: a run that
is killed while it writes leaves the checkpoint of the step before.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import webdataset
from PIL import Image
from torch import Tensor

from jest_stream import JESTDataset, SelectionConfig

NUM_STEPS = 12


def write_shards(folder: Path) -> None:
    """Writes four shards of 32 coloured squares with captions."""
    with webdataset.ShardWriter(f"{folder}/squares-%d.tar", maxcount=32, verbose=0) as writer:
        for number in range(4 * 32):
            shard, index = divmod(number, 32)
            colour = (8 * index, 60 * shard, 128)
            picture = Image.new("RGB", (16, 16), colour)
            writer.write({"__key__": f"{shard}-{index:02d}", "png": picture, "txt": f"{colour}"})


def colour_of(image: Image.Image) -> Tensor:
    """Returns `[3, 1, 1]`: the colour of the first pixel."""
    return torch.tensor(image.getpixel((0, 0))).float().view(3, 1, 1)


def tokenize(text: str) -> Tensor:
    """Returns `[16]`: the caption's bytes, padded with spaces."""
    return torch.tensor(list(text.encode().ljust(16))[:16])


def train(folder: Path, checkpoint: Path, die_at: int) -> None:
    """Takes the steps from the last checkpoint to NUM_STEPS; prints the keys of each batch."""
    dataset = JESTDataset(
        str(folder / "squares-*.tar"),
        selection=SelectionConfig(method="uniform"),  # with models it is the same
        transform=colour_of,
        tokenizer=tokenize,
        batch_size=4,
        as_dict=True,
    )
    with dataset:
        if checkpoint.exists():
            dataset.load_state_dict(torch.load(checkpoint, weights_only=True))
        for batch in dataset:
            # ... the training step; save the model and the optimizer with the dataset's state.
            step = dataset.metrics()["steps"]
            print(step, *batch["key"], flush=True)
            unfinished = checkpoint.with_suffix(".tmp")
            torch.save(dataset.state_dict(), unfinished)
            os.replace(unfinished, checkpoint)
            if step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == NUM_STEPS:
                return


def run(folder: Path, checkpoint: Path, die_at: int = 0) -> tuple[list[str], int]:
    """Runs `train` in a second process; returns its lines and its exit status."""
    command = [sys.executable, __file__, str(folder), str(checkpoint), str(die_at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout.splitlines(), done.returncode


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder)
        uninterrupted, _ = run(folder, folder / "a.pt")
        before, status = run(folder, folder / "b.pt", die_at=5)
        print(f"killed after step {len(before)}: exit status {status}")
        after, status = run(folder, folder / "b.pt")
        print(f"resumed with step {after[0].split()[0]}: exit status {status}")
    if before + after != uninterrupted:
        raise SystemExit("the resumed run was given other examples")
    print(f"all {NUM_STEPS} batches are those of the run that was not killed")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
