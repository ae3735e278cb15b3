"""Select by a rule of your own: a score function, a quality term and quotas per language.

    python examples/own_selection_rule.py

Needs no data: it makes up a crawl, with languages in unequal shares and a third of the captions
wrong. Prints the share of each language, and of wrong captions, among the examples offered
and among those selected.
"""

from itertools import islice
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from jest_stream import IterableSource, JESTDataset, Quota, SelectionConfig, Term

torch.manual_seed(0)
random, pictures = Random(0), torch.randn(200, 64)  # of 200 things, each named by a number


def make_example(number: int) -> dict[str, Any]:
    """Returns a picture of a thing and the number of a thing as its caption, often another."""
    thing, is_wrong = random.randrange(200), random.random() < 1 / 3
    return {
        "__key__": f"{number:05d}",
        "image": pictures[thing] + 0.3 * torch.randn(64),
        "text": torch.tensor([random.randrange(200) if is_wrong else thing]),
        "language": random.choices(["en", "sw", "yo"], [0.87, 0.10, 0.03])[0],
        "quality": random.gauss(-2.0 if is_wrong else 0.0, 1.0),  # a filter's opinion: a hint
        "is_wrong": is_wrong,
    }


class TwoTower(nn.Module):
    """The smallest model that can learn or be a reference: one layer for each side."""

    def __init__(self) -> None:
        super().__init__()
        self.encode_image, self.encode_text = nn.Linear(64, 32), nn.EmbeddingBag(200, 32)
        self.logit_scale = nn.Parameter(torch.tensor(2.3))  # the log, as in open_clip
        self.logit_bias = nn.Parameter(torch.tensor(-5.0))  # with a bias: the sigmoid loss

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Returns the sigmoid loss of a batch."""
        images = normalize(self.encode_image(images), dim=1)
        texts = normalize(self.encode_text(texts), dim=1)
        logits = self.logit_scale.exp() * images @ texts.T + self.logit_bias
        return -logsigmoid(logits * (2 * torch.eye(len(logits)) - 1)).sum() / len(logits)


def train_on(
    model: TwoTower, images: Tensor, texts: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    """Takes one training step."""
    loss = model(images, texts)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def capped_learnability(learner_loss: Tensor, reference_loss: Tensor) -> Tensor:
    """Returns the score of each pair: learnability, of which no single pair brings too much."""
    return (learner_loss - reference_loss).clamp(-2.0, 2.0)


examples = [make_example(number) for number in range(8000)]
reference, learner = TwoTower(), TwoTower()
optimizer = torch.optim.Adam(reference.parameters(), lr=0.01)
for _ in range(150):  # the reference learns from a clean set
    things = torch.randint(200, (256,))
    train_on(reference, pictures[things], things[:, None], optimizer)

dataset = JESTDataset(
    IterableSource(examples),
    learner=learner,
    reference=reference,
    batch_size=100,
    filter_ratio=0.8,
    as_dict=True,
    selection=SelectionConfig(
        score=capped_learnability,
        terms=(Term(value="quality", weight=0.5),),
        group_by="language",
        quotas={"sw": Quota(floor=0.15), "yo": Quota(share=0.05)},
    ),
)
optimizer, chosen = torch.optim.Adam(learner.parameters(), lr=0.01), []
for batch in islice(dataset, 40):
    chosen += [examples[int(key)] for key in batch["key"]]
    train_on(learner, batch["image"], batch["text"], optimizer)

groups = (examples, chosen)
print("                offered  selected")
for language in ("en", "sw", "yo"):
    shares = [sum(e["language"] == language for e in group) / len(group) for group in groups]
    print(f"{language:14}{shares[0]:9.1%}{shares[1]:10.1%}")
wrong = [sum(e["is_wrong"] for e in group) / len(group) for group in groups]
print(f"{'wrong caption':14}{wrong[0]:9.1%}{wrong[1]:10.1%}")
missing = sum(dataset.metrics()[f"quota_shortfall/{language}"] for language in ("sw", "yo"))
print(f"{missing} examples short of a floor or share")
