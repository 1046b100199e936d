"""LilNetX in the Trainer: latents in place of weights, bits and priors in every step, plain models out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer

from ...calibration import fold_batch_norm_
from ...checkpoints import cpu_copy
from ...family.coded import round_rest_
from ...training import CompressionMixin
from .config import LilNetXConfig
from .parametrization import bake, latent_layers, named_state, reparametrize
from .priors import slice_sparsity
from .regularization import Regularization

LATENTS = "lilnetx.safetensors"  # of a checkpoint, beside the plain model


class LilNetXMixin(CompressionMixin):
    """Makes any `Trainer` class train with LilNetX: `class MyLilNetXTrainer(LilNetXMixin, MyTrainer)`.

    The model that is passed has latents in place of its weights from then on; `bake` makes it plain. What is saved is a
    plain model, also by `model.save_pretrained`, and in checkpoints the latents beside it, to resume. The log gets
    "bits_per_parameter" as the entropy models estimate them, "slice_sparsity", "rate_weight", and "rate_ratio", the
    length of the gradient of the bits against that of the task.
    """

    method = "lilnetx"
    config_class = LilNetXConfig
    makes_variant = True
    state: Any
    regularization: Regularization

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model_init is not None:
            raise ValueError("LilNetX gives a model latents, which a model_init would replace; pass a model")
        self._refuse_sharding()
        if not latent_layers(self.model):
            reparametrize(self.model, **self.args.latents())
        self._refuse_foreign_optimizer()
        for layer in latent_layers(self.model):
            layer.module.register_state_dict_post_hook(_say_weight)
        self.regularization = Regularization(self.model, self.args)
        self.add_callback(self.regularization)

    def _refuse_foreign_optimizer(self) -> None:
        if self.optimizer is None:
            return
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if missing := [n for n, p in self.model.named_parameters() if ".decoder." in n and id(p) not in known]:
            raise ValueError(
                f"LilNetX makes new parameters, which the optimizer that is passed does not know ({missing[0]} for "
                "one); name it in the arguments (optim), or pass optimizer_cls_and_kwargs"
            )

    def _refuse_sharding(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            name = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(
                f"LilNetX decodes whole slices of a weight, and {name} deals them to the processes; launch it with "
                "DistributedDataParallel (DDP): accelerate launch --multi_gpu"
            )

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Latents and decoders do not decay: what makes latents small has weights of its own."""
        return [name for name in super().get_decay_parameter_names(model) if "parametrizations.weight." not in name]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what the last step has measured."""
        if "loss" in logs:
            logs |= {**self.regularization.logs(), "slice_sparsity": slice_sparsity(self.model)}
        super().log(logs, *args, **kwargs)

    def _plain(self) -> Any:
        """A copy of the model as it will be saved, on the CPU."""
        copied = cpu_copy(self.accelerator.unwrap_model(self.model))
        bake(copied)
        return copied

    @contextmanager
    def _plain_in_place(self) -> Iterator[None]:
        with self._in_place_of_the_model(self._plain().to(self.args.device)):
            yield

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        with self._in_place_of_the_model(self._plain()):
            super()._save(output_dir)
        tensors = {n: t.detach().cpu().contiguous() for n, t in self._named_state()}
        save_file(tensors, str(Path(output_dir or str(self.args.output_dir)) / LATENTS))

    def _named_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from named_state(self.model)
        yield from self.regularization.named_state()

    def _restore_weights(self, folder: str) -> bool:
        """What is no latent from the plain model of a checkpoint, and latents from the file beside it."""
        model, path = self.accelerator.unwrap_model(self.model), Path(folder) / LATENTS
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{folder} is no checkpoint of a LilNetXTrainer, or was damaged: {LATENTS} cannot be read ({error}); "
                "start without resume_from_checkpoint"
            ) from error
        for name, value in self._named_state():
            if name not in found or found[name].shape != value.shape:
                raise ValueError(
                    f"{folder} has no {name} of this model; resume with the model and the flags (linear_slice, "
                    "decoders, include, exclude) that the training began with"
                )
        if isinstance(model, PreTrainedModel):
            plain: Any = type(model).from_pretrained(folder, dtype="auto")
            state = plain.state_dict()
        else:
            state = load_file(Path(folder) / "model.safetensors")
        own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        model.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)
        with torch.no_grad():
            for name, value in named_state(model):
                value.copy_(found[name])
        self.regularization.load(found)
        return True

    def _compressed_metrics(self, *args: Any) -> dict[str, float]:
        with self._plain_in_place():
            return super()._compressed_metrics(*args)

    def _whole_model(self) -> Any:
        return self._plain().to(self.args.device)

    def _trained_variants(self) -> dict[str, Any]:
        copied = cpu_copy(self.accelerator.unwrap_model(self.model))
        if self.args.fold_batch_norm:
            fold_batch_norm_(copied)
        if self.args.half_rest:
            round_rest_(copied)
        return {self.args.variant: copied}


def _say_weight(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict has the weight, which `from_pretrained` knows, and not what it is decoded from."""
    inside = [name for name in state if name.startswith(f"{prefix}parametrizations.weight.")]
    if inside:
        with torch.no_grad():
            state[f"{prefix}weight"] = module.weight.detach()
    for name in inside:
        del state[name]


class LilNetXTrainer(LilNetXMixin, Trainer):
    """`transformers.Trainer` that trains with LilNetX; takes a `LilNetXConfig` as `args`, everything else as usual.

    ```python
    args = LilNetXConfig("out", rate_weight=0.1, learning_rate=1e-3, num_train_epochs=10)
    trainer = LilNetXTrainer(model=model, args=args, train_dataset=..., eval_dataset=...)
    trainer.train()
    family = trainer.build_family()  # the dense checkpoint, and the same weights in a few bits each
    ```
    """
