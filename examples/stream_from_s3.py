"""Stream pairs from an object store into a model, and go on where a checkpoint was taken.

pip install -e ".[s3]"
export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=...   # as for every AWS tool
export AWS_ENDPOINT_URL=https://...                      # for a store other than AWS
python examples/stream_from_s3.py "s3://bucket/pairs-{00000..00099}.tar"

Takes four steps with the demo's small model, then opens the stream again from its checkpoint, as
after a restart. Without an argument the address is read from the environment variable PAIRS.
"""

import os
import sys

import torch
from torch.utils.data import DataLoader

from jest_stream import JESTDataset
from jest_stream.demo.data import half_view, load_reference, shifted_view
from jest_stream.demo.model import HashTokenizer, TwoTowerModel

PAIRS = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PAIRS")


def make_dataset(learner: TwoTowerModel) -> JESTDataset:
    """Returns the stream; the same call, after a restart, continues it from a checkpoint."""
    return JESTDataset(
        PAIRS,
        learner=learner,
        reference=load_reference(),
        transform=half_view,  # scored: the view that this reference was trained at
        train_transform=shifted_view,
        tokenizer=HashTokenizer(),
        batch_size=8,
        filter_ratio=0.5,
        num_workers=2,
        as_dict=True,
    )


if __name__ == "__main__":
    if PAIRS is None:
        sys.exit(__doc__)
    torch.manual_seed(0)
    model = TwoTowerModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with make_dataset(model) as dataset:
        for step, batch in enumerate(DataLoader(dataset, batch_size=None), start=1):
            loss = model(batch["image"], batch["text"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step}: loss {loss.item():.3f}, for example {batch['key'][0]}")
            if step == 4:
                break
        checkpoint = dataset.state_dict()
        print("read from the store:", dataset.metrics().get("storage_bytes", 0), "bytes")

    with make_dataset(model) as dataset:  # as after a restart: seeks in the shards, by range
        dataset.load_state_dict(checkpoint)
        batch = next(iter(dataset))
        print("the next batch after the checkpoint begins with", batch["key"][0])
