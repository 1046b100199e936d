"""Distillation in one flag: half of the training loss is the distance of the logits to those of a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

TEMPERATURE = 2.0


class DistillationMixin(_TrainerBase):
    """Makes the loss of a step (task loss + T^2 KL(teacher || student)) / 2 where `args.teacher` names a model.

    KL is that of softmax(logits / T) with T = 2, for every output whose name contains "logits", their mean if there are
    several. Items whose label is -100 do not count, and it is divided as the task loss is: by the items of the whole
    accumulation window or, where the model takes a mean, by those of the batch. The evaluation shows the task loss.

    Source: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
    """

    args: Any
    model: Any
    teacher: Any = None  # no submodule of the model: neither saved nor wrapped nor stepped
    _needs_own_forward = False

    def _load_teacher(self) -> None:
        """ValueError, before anything is trained, where `args.teacher` cannot teach this model."""
        path, student = self.args.teacher, self.model
        if path is None:
            return
        if not isinstance(student, PreTrainedModel):
            raise ValueError(
                f"teacher={path!r} is loaded as the student's class, and {type(student).__name__} has no "
                "from_pretrained of transformers; train a transformers model, as TimmWrapperForImageClassification"
            )
        if self.args.n_gpu > 1 or self.is_deepspeed_enabled:
            raise ValueError(
                "teacher works on one process, with DistributedDataParallel and with FSDP; start one process for each "
                "device (accelerate launch --multi_gpu), without DeepSpeed"
            )
        student_class: Any = type(student)
        name = student_class.__name__
        try:
            teacher, info = student_class.from_pretrained(path, dtype=student.dtype, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise ValueError(f"teacher={path!r} is no folder or Hub id that {name} can load: {error}") from error
        if info["missing_keys"]:
            first, number = min(info["missing_keys"]), len(info["missing_keys"])
            raise ValueError(
                f"teacher={path!r} is no trained {name}: it lacks {number} weights, first {first}; give a checkpoint "
                "that was trained for the same task, of the same kind of model"
            )
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        # TRL computes its loss without logits, and those that it returns have no gradient.
        self._needs_own_forward = any(kind.__module__.startswith("trl.") for kind in type(self).__mro__)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The task loss, while a teacher's student trains together with the distance of its logits.

        Raises:
            ValueError: where the teacher's logits have another shape, or there are none that can be compared.
        """
        if self.teacher is None or not self.model.training:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        given = dict(inputs)  # labels may be taken out of the other
        found: Any = super().compute_loss(
            model, inputs, return_outputs=not self._needs_own_forward, num_items_in_batch=num_items_in_batch, **kwargs
        )
        loss, outputs = (found, model(**self._without_labels(inputs))) if self._needs_own_forward else found
        pairs = _paired_logits(outputs, self._teacher_outputs(given), self.model.config)
        if loss.requires_grad and not any(ours.requires_grad for ours, _ in pairs):
            raise ValueError(
                "teacher needs logits that have a gradient, and compute_loss of the class behind "
                f"{type(self).__name__} returns them without; train without a teacher"
            )
        parts = [self._scaled_as_the_loss(*pair, given, num_items_in_batch) for pair in pairs]
        loss = (loss + torch.stack(parts).mean()) / 2
        return (loss, outputs) if return_outputs else loss

    def _teacher_outputs(self, inputs: dict[str, Any]) -> Any:
        with torch.no_grad(), self.accelerator.autocast():
            return self.teacher(**self._without_labels(inputs))

    def _without_labels(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """A teacher of other classes would stumble over them. A decoder that starts from them keeps them."""
        if self.teacher.config.is_encoder_decoder:
            return inputs
        return {k: v for k, v in inputs.items() if k not in (*self.label_names, "labels", "shift_labels")}

    def _scaled_as_the_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, inputs: dict[str, Any], num_items: Any
    ) -> torch.Tensor:
        each = distances(student, teacher)
        counts = _counting_items(inputs, each, self._loss_shifts_labels)
        total = (each * counts).sum()
        divides_by_items = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if num_items is None or not divides_by_items or self.loss_is_scaled_for_ga is False:
            mean = total / counts.sum().clamp_min(1)
            # A loss function of the user's own divides by the steps of accumulation itself.
            is_scaled = self.loss_is_scaled_for_ga or self.compute_loss_func is not None
            return mean / self.current_gradient_accumulation_steps if is_scaled else mean
        # The Trainer multiplies by the processes where it has counted the items of all.
        processes = self.accelerator.num_processes // self.get_tp_size()
        return total / num_items * (processes if self.args.average_tokens_across_devices else 1)


def distances(student: torch.Tensor, teacher: torch.Tensor, temperature: float = TEMPERATURE) -> torch.Tensor:
    """T^2 KL(teacher || student) of each item, in nats.

    Args:
        student: logits (..., classes).
        teacher: logits of the same shape.
        temperature: T, which both are divided by.

    Returns:
        (...) in float32.
    """
    log_p = F.log_softmax(teacher.float() / temperature, -1)
    log_q = F.log_softmax(student.float() / temperature, -1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _paired_logits(student: Any, teacher: Any, config: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The logits of both, by name."""
    outputs = student if isinstance(student, Mapping) else {}
    names = [name for name, value in outputs.items() if "logits" in name and isinstance(value, torch.Tensor)]
    if not names:
        raise ValueError(
            "teacher needs outputs whose name contains 'logits', and the model gives "
            f"{', '.join(outputs) or type(student).__name__}; train without a teacher"
        )
    if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        raise ValueError(
            f"teacher compares distributions over classes, and the model is trained for {config.problem_type}; train "
            "without a teacher"
        )
    pairs = []
    for name in names:
        ours, other = outputs[name], teacher.get(name)
        shapes = tuple(ours.shape), None if other is None else tuple(other.shape)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the teacher's {name} have shape {shapes[1]}, the student's {shapes[0]}; take a teacher with the same "
                "number of labels and the same vocabulary"
            )
        if ours.ndim not in (2, 3) or ours.shape[-1] < 2:
            raise ValueError(
                "teacher compares logits of shape (batch, classes) or (batch, tokens, classes), 2 classes or more, "
                f"got {name} of shape {shapes[0]}; train without a teacher"
            )
        pairs.append((ours, other))
    return pairs


def _counting_items(inputs: dict[str, Any], each: torch.Tensor, shifts: bool) -> torch.Tensor:
    """1 for the items that the task loss counts, 0 for those whose label is -100; all where labels are of another kind.

    Args:
        inputs: of the model.
        each: one number for each item.
        shifts: whether the output at a token is compared with the label of the next one.
    """
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        if labels is not None and shifts and labels.shape == each.shape:
            labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    if labels is None or labels.shape != each.shape:
        return torch.ones_like(each)
    return labels.to(each.device).ne(-100).to(each.dtype)
