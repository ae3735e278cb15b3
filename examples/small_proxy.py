"""Let a small proxy do the scoring: it is trained beside the model, on the batches it chose.

    python examples/small_proxy.py                   # four steps on the demo's icons
    python examples/small_proxy.py --shards "/data/pairs/{00000..00099}.tar" --steps 10000

For a model that is too large, or sharded over too many devices, to score with. The proxy sees the
same batches as the model, so that the pairs it has not learned yet stand for those that the model
has not learned yet (ActiveCLIP, https://arxiv.org/abs/2312.05328). The reference has the proxy's
size: learnability is the difference between the two.

The reference here is untrained, which shows the mechanics and nothing else.
"""

import argparse
from itertools import islice

import open_clip
import torch

from jest_stream import JESTDataset, training_flops

WORDS = 16


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(0)
    model = clip(patch_size=8, width=192, layers=4)  # the model that is wanted
    proxy = clip(patch_size=16, width=64, layers=2)  # the one that scores
    reference = clip(patch_size=16, width=64, layers=2)  # a real one is trained, on data you trust

    contrastive = open_clip.ClipLoss()

    def step_flops(module: open_clip.CLIP) -> int:
        pair = torch.zeros(1, 3, 64, 64), torch.zeros(1, WORDS, dtype=torch.int64)
        return training_flops(module, lambda trained: contrastive(*trained(*pair)))

    dataset = JESTDataset(
        options.shards or demo_shards(),
        learner=proxy,  # the copy that scores is made of it
        reference=reference,
        transform=open_clip.image_transform(64, is_train=False),
        tokenizer=open_clip.SimpleTokenizer(context_length=WORDS),
        batch_size=options.batch_size,
        filter_ratio=0.8,
        # Both are trained; else the proxy's steps would be taken for all that training costs.
        training_flops=step_flops(model) + step_flops(proxy),
    )

    model.train()
    proxy.train()
    # Two models, two optimizers: neither's learning rate is the other's.
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    proxy_optimizer = torch.optim.AdamW(proxy.parameters(), lr=2e-3)
    for step, (images, texts) in enumerate(islice(dataset, options.steps)):
        loss = contrastive(*model(images, texts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        proxy_loss = contrastive(*proxy(images, texts))
        proxy_optimizer.zero_grad()
        proxy_loss.backward()
        proxy_optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}, of the proxy {proxy_loss.item():.3f}")
    print(dataset.cost())
    dataset.close()


def clip(*, patch_size: int, width: int, layers: int) -> open_clip.CLIP:
    """Returns an untrained CLIP for images of 64 px."""
    vision = {"image_size": 64, "patch_size": patch_size, "head_width": 32}
    text = {"context_length": WORDS, "width": 64, "heads": 2, "layers": 2}
    return open_clip.CLIP(64, {**vision, "width": width, "layers": layers}, text)


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
