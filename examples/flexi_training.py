"""Score at a quarter of the image tokens, and train half of each batch there (Flexi-JEST).

    python examples/flexi_training.py                # four steps on the demo's icons
    python examples/flexi_training.py --shards "/data/pairs/{00000..00099}.tar" --steps 10000

Scoring small views is cheap, but a model that never trains on them scores them badly. So half of
each batch comes at the small size, and trains the same weights there: the position embeddings of
the small model are resampled from the large one's, and gradients go back the same way.

The reference here is untrained, which shows the mechanics and nothing else.
"""

import argparse
from itertools import islice

import open_clip
import torch

from jest_stream import JESTDataset, ScoringConfig, at_score_size

WORDS = 16


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(0)
    model, reference = small_clip(), small_clip()  # a real reference is trained, on data you trust
    tokenizer = open_clip.SimpleTokenizer(context_length=WORDS)

    scoring = ScoringConfig(image_size=32)  # of 64: 16 tokens instead of 64
    dataset = JESTDataset(
        options.shards or demo_shards(),
        learner=model,
        reference=reference,
        transform=open_clip.image_transform(64, is_train=False),
        tokenizer=tokenizer,
        scoring=scoring,
        score_view_fraction=0.5,  # of each batch
        batch_size=options.batch_size,
        filter_ratio=0.8,
    )
    small_model = at_score_size(model, scoring)  # the same parameters, at 32 px

    model.train()  # small_model too: its layers are the same
    contrastive = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # once: there is one set of weights
    for step, (batch, small_batch) in enumerate(islice(dataset, options.steps)):
        # Each part is contrasted with itself, since pairs of two sizes would be told apart by
        # their size. Both losses are means over examples: weighted by how many there are, every
        # example of the batch counts the same.
        loss = contrastive(*model(*batch))
        small_loss = contrastive(*small_model(*small_batch))
        num_large, num_small = len(batch[1]), len(small_batch[1])
        total = (num_large * loss + num_small * small_loss) / (num_large + num_small)
        optimizer.zero_grad()
        total.backward()  # once for both sizes; under DDP it averages both over the ranks
        optimizer.step()
        print(
            f"step {step}: {num_large} at {batch[0].shape[-1]} px, loss {loss.item():.3f}; "
            f"{num_small} at {small_batch[0].shape[-1]} px, loss {small_loss.item():.3f}"
        )
    dataset.close()


def small_clip() -> open_clip.CLIP:
    """Returns an untrained CLIP: a vision transformer of 64 tokens, a text transformer."""
    vision = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 3, "head_width": 32}
    text = {"context_length": WORDS, "width": 64, "heads": 2, "layers": 2}
    return open_clip.CLIP(64, vision, text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", help="tar shards; default: the demo's icons")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    return parser.parse_args()


def demo_shards() -> list[str]:
    from jest_stream.demo.data import unpack

    return unpack()


if __name__ == "__main__":
    main()
