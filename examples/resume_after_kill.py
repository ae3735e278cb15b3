"""Kills a training run in the middle, resumes it, and shows that nothing was lost or repeated.

python examples/resume_after_kill.py

The run is a process of its own that saves a checkpoint after each step: written aside first, then
renamed, so that a run that is killed meanwhile leaves the one before.
"""

import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from PIL import Image

from jest_stream import JESTDataset, SelectionConfig

NUM_STEPS = 12


def write_shards(folder):
    """Four shards of 32 coloured squares with captions."""
    for shard in range(4):
        with tarfile.open(folder / f"squares-{shard}.tar", "w") as archive:
            for index in range(32):
                colour = (8 * index, 60 * shard, 128)
                picture = io.BytesIO()
                Image.new("RGB", (16, 16), colour).save(picture, "PNG")
                for suffix, data in (("png", picture.getvalue()), ("txt", f"{colour}".encode())):
                    member = tarfile.TarInfo(f"{shard}-{index:02d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def train(folder, checkpoint, die_at):
    """Takes the steps up to NUM_STEPS from the last checkpoint on; prints the keys it was given."""
    with (
        JESTDataset(
            str(folder / "squares-*.tar"),
            selection=SelectionConfig(method="uniform"),  # with models it is the same
            transform=lambda image: torch.tensor(image.getpixel((0, 0))).float().view(3, 1, 1),
            tokenizer=lambda text: torch.tensor(list(text.encode().ljust(16))[:16]),
            batch_size=4,
            as_dict=True,
        ) as dataset
    ):
        if checkpoint.exists():
            dataset.load_state_dict(torch.load(checkpoint, weights_only=True))
        for batch in dataset:
            # ... the training step; save the model and the optimizer with the dataset's state.
            step = dataset.metrics()["steps"]
            print(step, *batch["key"], flush=True)
            torch.save(dataset.state_dict(), aside := checkpoint.with_suffix(".tmp"))
            os.replace(aside, checkpoint)
            if step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == NUM_STEPS:
                return


def run(folder, checkpoint, die_at=None):
    """Runs `train` in a process of its own; returns its lines and how it ended."""
    command = [sys.executable, __file__, str(folder), str(checkpoint), str(die_at or 0)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout.splitlines(), done.returncode


def main():
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
