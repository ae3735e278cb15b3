"""Stream pairs from a dataset repository of the Hugging Face Hub into a model.

hf auth login                                            # for a private or gated repository
python examples/stream_from_hub.py org/name              # of tars or Parquet files

Takes four steps with the demo's small model. Without an argument the name of the repository is read
from the environment variable HUB_DATASET.
"""

import os
import sys

import torch
from torch.utils.data import DataLoader

from jest_stream import HuggingFaceSource, JESTDataset
from jest_stream.demo.data import half_view, load_reference, shifted_view
from jest_stream.demo.model import HashTokenizer, TwoTowerModel

name = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("HUB_DATASET")
if name is None:
    sys.exit(__doc__)
source = HuggingFaceSource(
    name,
    split="train",
    # revision="...",                      # a commit, to resume after the branch has moved
    # image_key="photo", text_key="title", # columns of Parquet files, if they cannot be told
)
print(source, "at commit", source.commit)

torch.manual_seed(0)
model = TwoTowerModel()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
dataset = JESTDataset(
    source,
    learner=model,
    reference=load_reference(),
    transform=half_view,  # scored: the view that this reference was trained at
    train_transform=shifted_view,
    tokenizer=HashTokenizer(),
    batch_size=8,
    filter_ratio=0.5,
    on_bad_example="skip",
    as_dict=True,
)
with dataset:
    for step, batch in enumerate(DataLoader(dataset, batch_size=None), start=1):
        loss = model(batch["image"], batch["text"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}, for example {batch['key'][0]}")
        if step == 4:
            break
    print("read from the Hub:", dataset.metrics().get("storage_bytes", 0), "bytes")
