"""Embed the icons once with the reference, then train from the embeddings: no reference runs.

    python examples/cache_reference.py

Writes the embeddings to the folder `reference_cache`. The batches also bring the reference's
embeddings of the chosen examples, and the learner is trained to imitate them as well (distillation,
as in ACED, https://arxiv.org/abs/2411.18674).
"""

from itertools import islice
from pathlib import Path

import torch
from torch.nn import functional as F

from jest_stream import JESTDataset, ReferenceCache
from jest_stream.demo.data import half_view, load_reference, shifted_view, unpack
from jest_stream.demo.model import HashTokenizer, TwoTowerModel

shards = unpack()[:2]  # tar shards; yours could be "/data/pairs/{00000..00999}.tar"
tokenizer = HashTokenizer()
folder = Path("reference_cache")  # or "s3://bucket/reference-cache"

# Killed and started again, it goes on with the shard it was at; done once, it does nothing.
cache = ReferenceCache.build(
    shards,
    load_reference(),
    folder,
    transform=half_view,  # the view that this reference was trained at
    tokenizer=tokenizer,
    show_progress=True,
)
print(cache.summary())

torch.manual_seed(0)
model = TwoTowerModel()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
dataset = JESTDataset(
    shards,
    learner=model,
    reference=cache,  # or its path
    transform=half_view,
    train_transform=shifted_view,
    tokenizer=tokenizer,
    batch_size=64,
    filter_ratio=0.8,
    as_dict=True,
    with_reference=True,
)
with dataset:
    for step, batch in enumerate(islice(dataset, 5)):
        reference = batch["reference"]  # image and text: [b, D]; logit_scale; logit_bias
        targets = reference["logit_scale"] * reference["image"] @ reference["text"].T
        image = F.normalize(model.encode_image(batch["image"]), dim=-1)
        text = F.normalize(model.encode_text(batch["text"]), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T
        distillation = F.kl_div(logits.log_softmax(1), targets.softmax(1), reduction="batchmean")
        loss = model(batch["image"], batch["text"]) + distillation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(
            f"step {step + 1}: loss {loss.item():.2f}, of it {distillation.item():.2f} to imitate"
        )
    print(f"{dataset.metrics()['scoring_s']:.1f} s of scoring, all of it the learner's")
