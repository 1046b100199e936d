"""From dense to a pattern while a Trainer trains, on the cubic schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from ..patterns import Pattern, Quantized, parse_pattern
from .lock import HeldZeros

logger = logging.get_logger(__name__)


class GradualPruning(HeldZeros):
    """Prunes a model while any Trainer trains it, from dense to a pattern.

    ```python
    pruning = hfc.GradualPruning("unstructured:0.9", begin=0.1, end=0.7)
    trainer = Trainer(model=model, args=args, train_dataset=train, callbacks=[pruning])
    ```

    After step t the share s_t = s_f (1 - (1 - (t - begin) / (end - begin))^3) is removed, s_f that of the pattern, for
    t = begin, begin + every, ..., end; of N:M floor((M - N) s_t / s_f) weights of each group. The smallest magnitudes
    go, and what is zero stays zero until the training ends. A pattern that rounds at last ("2:4+int8") is pruned on the
    schedule and rounded once, when the training ends: rounding in between would only undo steps.

    The schedule depends on the step alone, and the zeros are those of the weights: a resumed run is the uninterrupted
    one. Memory and what it runs under are as for `SparsityLock`.

    Args:
        pattern: such as "unstructured:0.9" or "2:4".
        begin: the last dense step: a whole number of optimizer steps, or a share of the run in [0.0, 1.0].
        end: the step that reaches the pattern, given in the same way; from there the zeros are fixed.
        every: optimizer steps from one renewal of the zeros to the next. The paper finds no difference between 100 and
            1000 in long runs; fine-tuning is shorter, and a renewal costs less than a third of a step (measured with
            BERT on a CPU, 512 tokens a step: 0.15 for a share, 0.3 for 2:4, and 0.03 for zeros written again).
        include: globs on names, see `find_targets`.
        exclude: globs on names, see `find_targets`.

    Raises:
        ValueError: for a wrong pattern, one without zeros or a way in between (`int8`), or a wrong schedule. When
            the training begins, for a schedule that does not fit into the run, for `load_best_model_at_end` where the
            best model may be one from before `end`, and as `SparsityLock` for what single weights are hidden by.
        RuntimeError: at a save or at the end, naming a weight, if something else has undone zeros.

    Source: Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878, equation 1 with s_i = 0.
    """

    def __init__(
        self,
        pattern: str | Pattern,
        begin: float,
        end: float,
        every: int = 10,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        super().__init__(include, exclude)
        self.pattern = parse_pattern(pattern)
        self.pattern.partway(0.5)  # refuses what has no way in between
        try:
            self.pattern.select({})
        except TypeError as error:
            raise ValueError(f"GradualPruning holds zeros: {error}") from error
        self.begin, self.end = _check_moment("begin", begin), _check_moment("end", end)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
        self.every = every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the schedule fits into the run; after a resume hold the zeros of the checkpoint."""
        self.find(args, kwargs["model"])
        self.num_zeros()  # refuses tensor parallelism
        skipped = [self.pattern.skip_reason(target) for target in self.targets.values()]
        if all(skipped):
            raise ValueError(f"{self.pattern} leaves all {len(skipped)} targets dense: the first, because {skipped[0]}")
        self._first, self._last = (_step(moment, state.max_steps) for moment in (self.begin, self.end))
        if self._last > state.max_steps or self._last - self._first <= self.every:
            raise ValueError(
                f"pruning from step {self._first} to step {self._last} every {self.every} does not fit into a run of "
                f"{state.max_steps} steps: end must lie in the run, and more than `every` steps after begin"
            )
        if args.load_best_model_at_end and not (args.eval_strategy == "steps" and args.eval_delay >= self._last):
            raise ValueError(
                f"load_best_model_at_end could bring back a model from before step {self._last}, which reaches "
                f'{self.pattern}; set eval_strategy="steps" and eval_delay={self._last}, or leave it out'
            )
        self._renew(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the zeros again, so that they are the smallest, and add to them where the schedule says so."""
        super().on_optimizer_step(args, state, control, **kwargs)
        step = state.global_step + 1  # the Trainer counts it after this event
        if self._pattern_after(step) != self._pattern_after(step - 1):
            self._renew(step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the zeros and round the values of a chain."""
        targets = self.targets
        super().on_train_end(args, state, control, **kwargs)
        if state.global_step < self._last:
            logger.warning(
                f"The training ended at step {state.global_step}, before step {self._last} in which GradualPruning "
                f"would have reached {self.pattern}."
            )
            return
        with torch.no_grad():
            self.pattern.compress_(targets)  # its zeros are there already

    def _pattern_after(self, step: int) -> Pattern | None:
        """What the last renewal up to this step has reached, None for a dense model."""
        if step >= self._last:
            return self.pattern
        steps = max(step - self._first, 0) // self.every * self.every
        return self.pattern.partway(1 - (1 - steps / (self._last - self._first)) ** 3)

    @torch.no_grad()
    def _renew(self, step: int) -> None:
        pattern = self._pattern_after(step)
        if pattern is None:
            return
        for part in getattr(pattern, "parts", (pattern,)):
            if not isinstance(part, Quantized):  # rounding waits for the end
                part.compress_(self.targets)
        self.hold()


def _check_moment(name: str, moment: float) -> float:
    is_number = isinstance(moment, (int, float)) and not isinstance(moment, bool)
    if not is_number or not moment >= 0 or (isinstance(moment, float) and not moment <= 1):
        raise ValueError(
            f"{name}={moment!r} is no moment of a run: give a whole number of optimizer steps, such as 1000, or a "
            "share of the run in [0.0, 1.0], such as 0.25"
        )
    return moment


def _step(moment: float, max_steps: int) -> int:
    return moment if isinstance(moment, int) else round(moment * max_steps)
