"""How the penalty of TPP grows, when rows are set to zero, and how far it all shrinks them."""

from __future__ import annotations

from dataclasses import dataclass

# Published for CIFAR, published for ImageNet, and ours, which shrinks rows by 20 e-folds where those have 600.
PROFILES = {
    "paper": {"grow_steps": 100_000, "grow_every": 10, "stabilize_steps": 10_000, "zero_every": 100},
    "paper_imagenet": {"grow_steps": 50_000, "grow_every": 5, "stabilize_steps": 40_000, "zero_every": 100},
    "short": {"grow_steps": 2_000, "grow_every": 10, "stabilize_steps": 1_000, "zero_every": 0},
}


@dataclass(frozen=True)
class GrowingSchedule:
    """The strength of the penalty over optimizer steps, counted from 0.

    It grows in equal steps from 0 to `ceiling`, which it reaches at step `grow_steps`, and stays there for
    `stabilize_steps` more. In these, one layer after the other is set to zero for good.

    Attributes:
        grow_steps: U, until the ceiling.
        stabilize_steps: S, at the ceiling.
        grow_every: K, steps between one growth and the next.
        ceiling: the largest strength.
        zero_every: Z, steps from one layer set to zero to the next; 0 spreads them over half of `stabilize_steps`.
        num_layers: of the model, all its Linear and convolutions.

    Raises:
        ValueError: for steps that are no whole numbers from 0, or layers that would not all be zero at the end.

    Source: Wang and Fu, arXiv:2207.12534, section 3.3 and the published configuration.
    """

    grow_steps: int
    stabilize_steps: int
    grow_every: int = 10
    ceiling: float = 1.0
    zero_every: int = 0
    num_layers: int = 1

    def __post_init__(self) -> None:
        for name, least in (("grow_steps", 0), ("stabilize_steps", 0), ("grow_every", 1), ("zero_every", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is a whole number of at least {least}, got {value!r}")
        if not 0 <= self.ceiling < float("inf"):
            raise ValueError(f"ceiling must be a number of at least 0, got {self.ceiling!r}")
        needed = self.zero_every * self.num_layers + 1
        if self.zero_every and needed > self.stabilize_steps:
            raise ValueError(
                f"setting {self.num_layers} layers to zero, one every {self.zero_every} steps, takes {needed} steps, "
                f"more than the {self.stabilize_steps} of stabilize_steps; give more, or zero_every=0"
            )

    @property
    def steps(self) -> int:
        """How many optimizer steps there are in all."""
        return self.grow_steps + self.stabilize_steps

    def strength(self, step: int) -> float:
        """The strength in an optimizer step, 0 in the first `grow_every`."""
        if step >= self.grow_steps:
            return self.ceiling
        return self.ceiling * (step // self.grow_every * self.grow_every) / self.grow_steps

    def is_zeroed(self, layer: int, step: int) -> bool:
        """Whether a layer, counted from 0, is set to zero after an optimizer step."""
        every = self.zero_every or self.stabilize_steps / (2 * self.num_layers)
        return self.stabilize_steps > 0 and step - self.grow_steps >= (layer + 1) * every

    def e_folds(self, rate: float) -> float:
        """By what power of e the rows shrink that the penalty alone moves.

        Args:
            rate: how far a step moves them, by strength 1: the learning rate of SGD divided by (1 - momentum).
        """
        return rate * sum(map(self.strength, range(self.steps)))
