"""Train an open_clip ViT on jointly selected batches: a plain loop, the JEST lines marked.

    python examples/train_open_clip.py                        # three steps on the demo's icons
    python examples/train_open_clip.py --shards "/data/pairs/{00000..00099}.tar" \
        --model ViT-B-32 --reference laion2b_s34b_b79k --batch-size 256 --steps 10000

The reference decides which pairs are learned first: take one that is good at the tasks of your
model. Left out, an untrained one stands in, which shows the mechanics and nothing else.
"""

import argparse
from itertools import islice

import open_clip
import torch

from jest_stream import JESTDataset  # JEST


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(options.model)
    tokenizer = open_clip.get_tokenizer(options.model)
    reference = open_clip.create_model(options.model, pretrained=options.reference)  # JEST

    dataset = JESTDataset(  # JEST
        options.shards or demo_shards(),
        learner=model,
        reference=reference,
        transform=preprocess,
        tokenizer=tokenizer,
        batch_size=options.batch_size,
        filter_ratio=options.filter_ratio,
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=None)

    model.train()
    loss = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step, (images, texts) in enumerate(islice(loader, options.steps)):
        image_features, text_features, logit_scale = model(images, texts)
        value = loss(image_features, text_features, logit_scale)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        metrics = dataset.metrics()  # JEST
        print(
            f"step {step}: loss {value.item():.3f}, "
            f"learnability selected {metrics['selected_score']:.3f}, "
            f"offered {metrics['candidate_score']:.3f}, "
            f"copy {metrics['staleness']} steps old"
        )
    dataset.close()  # JEST


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", help="tar shards; default: the demo's icons")
    parser.add_argument("--model", default="ViT-S-32-alt", help="an open_clip model name")
    parser.add_argument("--reference", help="pretrained tag of the reference; default: untrained")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--filter-ratio", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=3)
    return parser.parse_args()


def demo_shards() -> list[str]:
    from jest_stream.demo.data import unpack

    return unpack()


if __name__ == "__main__":
    main()
