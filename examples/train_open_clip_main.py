"""Train with open_clip's own program, `open_clip_train.main`, on jointly selected batches.

    python examples/train_open_clip_main.py                   # two steps on the demo's icons
    REFERENCE=open_clip:ViT-B-32/laion2b_s34b_b79k python examples/train_open_clip_main.py \\
        --train-data "/data/pairs/{00000..00099}.tar" --train-num-samples 1000000 \\
        --batch-size 256 --workers 8 --model ViT-B-32 --precision amp_bf16

Takes the program's own options. Two of its functions are replaced: the one that makes the data, and
the one that makes the model, because the former is not given the model. REFERENCE is a name, or the
address of a cache; without it an untrained model stands in, which shows the mechanics and nothing
else.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import open_clip_train.main as trainer
from torch import nn

from jest_stream import JESTDataset

make_model, make_data = trainer.create_model_and_transforms, trainer.get_data
models: list[nn.Module] = []


def keep_model(*arguments: Any, **options: Any) -> Any:
    """Makes a model as ever, and remembers it; the first one made is the learner."""
    made = make_model(*arguments, **options)
    models.append(made[0])
    return made


class TrainData:
    """The training data as the program wants it: `DataInfo.set_epoch` asks no dataset."""

    def __init__(self, dataset: JESTDataset) -> None:
        self.dataloader = dataset  # it has num_batches and num_samples
        self.set_epoch: Callable[[int], None] = dataset.set_epoch


def get_data(
    args: argparse.Namespace,
    preprocess_fns: tuple[Any, Any],
    epoch: int = 0,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Makes the validation data as ever, and the training data of jointly selected batches."""
    shards, args.train_data = args.train_data, None
    data: dict[str, Any] = make_data(args, preprocess_fns, epoch, tokenizer)
    args.train_data = shards
    preprocess_train, preprocess_val = preprocess_fns
    dataset = JESTDataset(
        shards,
        learner=models[0],
        reference=os.environ.get("REFERENCE") or make_model(args.model)[0],
        transform=preprocess_val,
        train_transform=preprocess_train,
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        filter_ratio=0.8,
        steps_per_epoch=args.train_num_samples // (args.batch_size * args.world_size),
        num_workers=args.workers,
        seed=args.seed,
    )
    print(dataset)
    return {**data, "train": TrainData(dataset)}


def demo_arguments() -> list[str]:
    """Returns options for two steps of a small model on the demo's icons."""
    from jest_stream.demo.data import unpack

    shards = unpack()[0].replace("000.tar", "*.tar")
    options = "--train-num-samples 8 --batch-size 4 --epochs 1 --workers 0 --model ViT-S-32-alt"
    return ["--train-data", shards, *options.split()]


if __name__ == "__main__":
    trainer.create_model_and_transforms, trainer.get_data = keep_model, get_data
    trainer.main(sys.argv[1:] or demo_arguments())
