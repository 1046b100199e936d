"""Training data read beside the training, which goes on as if nobody had looked."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler


class TrainingBatches:
    """Batches of a trainer's training data in an order of their own; every pass is the same.

    The trainer's own loader would deal its batches to the ranks, and take its order from the training's generator.

    Args:
        trainer: whose data, collator and batch size they are.
        seed: of their order, and of what augmentation draws.
    """

    def __init__(self, trainer: Any, seed: int) -> None:
        self.trainer, self.seed = trainer, seed

    def __iter__(self) -> Generator[Any]:
        args, dataset = self.trainer.args, self.trainer.train_dataset
        sampler = None
        if not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
            sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(self.seed))
        loader = DataLoader(
            dataset,
            batch_size=args.per_device_train_batch_size,
            sampler=sampler,
            collate_fn=self.trainer._get_collator_with_removed_columns(self.trainer.data_collator),
        )
        with generators_kept():  # augmentation draws from the global ones
            random.seed(self.seed)
            np.random.seed(self.seed % 2**32)
            torch.default_generator.manual_seed(self.seed)
            yield from loader


@contextmanager
def generators_kept() -> Iterator[None]:
    """The global generators of the CPU are afterwards what they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
