"""Train on jointly selected batches of real icons, and compare the selected with the offered.

python examples/quickstart.py

Takes 20 steps with the demo's small model, on a CPU. The reference was trained on emoji. Prints the
learnability of the selected pairs beside that of pairs drawn uniformly: the former is the larger.
"""

from itertools import islice

import torch
from torch.utils.data import DataLoader

from jest_stream import JESTDataset
from jest_stream.demo.data import half_view, load_reference, shifted_view, unpack
from jest_stream.demo.model import HashTokenizer, TwoTowerModel

torch.manual_seed(0)
model = TwoTowerModel()
dataset = JESTDataset(
    unpack(),  # tar shards; yours could be "/data/pairs/{00000..00999}.tar"
    learner=model,
    reference=load_reference(),  # frozen, trained on emoji: these will be learned first
    transform=half_view,  # scored: the view that this reference was trained at
    train_transform=shifted_view,
    tokenizer=HashTokenizer(),
    text_key="txt",
    batch_size=128,
    filter_ratio=0.8,
    as_dict=True,
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

with dataset:
    for step, batch in enumerate(islice(DataLoader(dataset, batch_size=None), 20)):
        loss = model(batch["image"], batch["text"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metrics = dataset.metrics()
        if step % 5 == 4:
            selected, offered = metrics["selected_score"], metrics["candidate_score"]
            print(f"step {step + 1}: loss {loss.item():.2f}, learnability of the selected pairs")
            print(f"  {selected:+.2f}, had they been drawn uniformly {offered:+.2f}")
    print("for example:", *batch["key"][:5])
    print(dataset)
