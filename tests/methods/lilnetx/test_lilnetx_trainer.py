"""LilNetX in the Trainer: against an independent loop, resumed, in a family, and refused by name."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForImageClassification, TrainerCallback

import hf_compress as hfc
from hf_compress.methods.lilnetx import decoders_of, entropy_models, latent_layers
from tests.conftest import image_samples, text_samples, tiny_bert, tiny_resnet, tiny_vit


def config(folder, **overrides):
    fields = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.05,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "entropy_fit_steps": 5,
    }
    return hfc.LilNetXConfig(**{**fields, **overrides})


def make(folder, model=None, data=None, **overrides):
    data = image_samples() if data is None else data
    return hfc.LilNetXTrainer(
        model=tiny_resnet() if model is None else model,
        args=config(folder, **overrides),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


def train(folder, model=None, **overrides):
    trainer = make(folder, model, **overrides)
    trainer.train()
    return trainer


class Snapshots(TrainerCallback):
    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append({n: p.detach().clone() for n, p in model.named_parameters()})


def kind_of(weight):
    return tuple(weight.shape[2:]) if weight.ndim == 4 else ("linear", 8 if weight.shape[1] % 8 == 0 else 1)


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, g):
        return g


def published_bits(parameters, x):
    """Probabilities of the factorized model as a plain difference."""
    slopes, offsets, bends = (parameters[n] for n in ("slopes", "offsets", "bends"))

    def cdf(t):
        for i in range(3):
            t = t * functional.softplus(slopes[i]) + offsets[i]
            t = t + torch.tanh(t) * torch.tanh(bends[i])
        return torch.sigmoid(t * functional.softplus(slopes[3]) + offsets[3])

    return -torch.log2(cdf(x + 0.5) - cdf(x - 0.5))


def test_steps_equal_an_independent_loop(tmp_path):
    """All samples in a batch, SGD with momentum, clipping of the task alone, bits, squares and norms beside it."""
    start = tiny_resnet()
    weights = {"rate_weight": 0.3, "l2_weight": 0.2, "slice_weight": 0.4, "entropy_learning_rate": 0.01}
    trainer = make(
        tmp_path,
        copy.deepcopy(start),
        per_device_train_batch_size=48,
        max_grad_norm=0.5,
        max_steps=3,
        entropy_fit_steps=0,
        **weights,
    )
    names = [f"{layer.path}.weight" for layer in latent_layers(trainer.model)]
    # in the layout of the loop below: latents, one matrix and one distribution for each kind of layer
    latents = {n: start.get_parameter(n).detach().clone().requires_grad_() for n in names}
    gains = {n: w.detach().std(correction=0) / 3 for n, w in latents.items()}
    rows = {n: math.prod(w.shape[2:]) if w.ndim == 4 else kind_of(w)[1] for n, w in latents.items()}
    rows |= {n: 1 for n, row in rows.items() if row == 49}  # of the stem, whose decoder would outnumber its weights
    kinds = dict.fromkeys(kind_of(w) for w in latents.values())
    matrices = {k: torch.eye(next(rows[n] for n in names if kind_of(latents[n]) == k)) for k in kinds}
    matrices = {k: m.requires_grad_() for k, m in matrices.items()}
    models = [
        {n: p.detach().clone().requires_grad_() for n, p in m.named_parameters()}
        for m in entropy_models(trainer.model, 42)
    ]
    entropies = dict(zip(kinds, models, strict=True))
    others = {n: p for n, p in start.named_parameters() if n not in latents}
    optimizer = torch.optim.SGD([*latents.values(), *matrices.values(), *others.values()], lr=0.05, momentum=0.9)
    adam = torch.optim.Adam([p for m in models for p in m.values()], 0.01)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()

    batch = {k: torch.stack([s[k] for s in image_samples()]) for k in ("pixel_values", "labels")}
    start.train()
    count = sum(w.numel() for w in latents.values())
    for step in range(3):
        optimizer.zero_grad()
        adam.zero_grad()
        scaled = {n: w.reshape(-1, rows[n]) / gains[n] for n, w in latents.items()}
        decoded = {
            n: (Round.apply(x) @ matrices[kind_of(latents[n])] * gains[n]).reshape(latents[n].shape)
            for n, x in scaled.items()
        }
        torch.func.functional_call(start, decoded, kwargs=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([*latents.values(), *matrices.values(), *others.values()], 0.5)
        generator = torch.Generator().manual_seed((42 << 32) + step)
        bits = squares = norms = 0
        for n, w in latents.items():
            x = w.reshape(-1, rows[n]) / gains[n]
            noise = torch.rand(x.shape, generator=generator) - 0.5
            bits = bits + published_bits(entropies[kind_of(w)], x + noise).sum()
            squares = squares + x.square().sum()
            if rows[n] > 1 and w.ndim == 4:
                norms = norms + x.norm(dim=1).sum()
            elif rows[n] > 1:
                height = 8 if w.shape[0] % 8 == 0 else 1
                phi = w / gains[n]
                for o in range(0, w.shape[0], height):
                    for i in range(0, w.shape[1], 8):
                        norms = norms + phi[o : o + height, i : i + 8].norm()
        ((0.3 * bits + 0.2 * squares + 0.4 * norms) / count).backward()
        for p in adam.param_groups[0]["params"]:
            p.grad /= 0.3  # the distributions learn from bits, whatever these cost
        optimizer.step()
        adam.step()
        found = snapshots.states[step]
        for n, w in latents.items():
            ours = found[n.removesuffix("weight") + "parametrizations.weight.original"]
            assert (ours - w).abs().max() < 1e-6, (step, n)
        for n, p in others.items():
            assert (found[n] - p).abs().max() < 1e-6, (step, n)
    for decoder, matrix in zip(decoders_of(trainer.model), matrices.values(), strict=True):
        assert (decoder.matrix - matrix).abs().max() < 1e-6
    for ours, theirs in zip(entropy_models(trainer.model), models, strict=True):
        for name, p in ours.named_parameters():
            assert (p - theirs[name]).abs().max() < 2e-5  # Adam divides rounding errors by themselves


def test_the_weight_is_calibrated_at_the_start_and_after_an_epoch(tmp_path):
    trainer = train(tmp_path, rate_ratio=0.5, max_steps=-1, num_train_epochs=3)
    log = [row for row in trainer.state.log_history if "loss" in row]
    found = [row["rate_weight"] for row in log]
    assert len(found) == 9
    assert found[0] == found[2] > 0
    assert found[3] == found[8] != found[0]
    assert log[0]["rate_ratio"] == pytest.approx(0.5, rel=1e-5)
    assert log[3]["rate_ratio"] == pytest.approx(0.5, rel=1e-5)
    assert all(1 < row["bits_per_parameter"] < 8 and row["slice_sparsity"] >= 0 for row in log)
    given = train(tmp_path, rate_weight=0.25)
    assert {row["rate_weight"] for row in given.state.log_history if "loss" in row} == {0.25}


def test_bits_fall_where_they_cost_something(tmp_path):
    options = {"max_steps": 40, "optim": "adamw_torch", "optim_args": None, "learning_rate": 5e-3}
    free, cheap = (train(tmp_path, rate_weight=w, **options) for w in (0.0, 3.0))
    bits = [t.state.log_history[-2]["bits_per_parameter"] for t in (free, cheap)]
    assert bits[1] < bits[0] - 0.3
    priors = train(tmp_path, rate_weight=0.0, slice_weight=30.0, **options)
    assert priors.state.log_history[-2]["slice_sparsity"] > free.state.log_history[-2]["slice_sparsity"] + 0.1


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}, {"bf16": True}]
)
def test_resumed_it_ends_bit_for_bit_alike(tmp_path, options):
    options = {**options, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "optim_args": None}
    whole = train(tmp_path, **options)
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    resumed = make(tmp_path, tiny_resnet(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    states = dict(whole._named_state()), dict(resumed._named_state())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_accumulated_micro_batches_take_the_steps_of_whole_ones(tmp_path):
    model = tiny_bert()
    one = train(tmp_path, copy.deepcopy(model), data=text_samples(), rate_weight=0.3)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    four = train(tmp_path, copy.deepcopy(model), data=text_samples(), rate_weight=0.3, **options)
    for (name, a), b in zip(one.model.named_parameters(), four.model.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5, name


def test_mixed_precision_keeps_latents_and_bits_in_full(tmp_path):
    trainer = train(tmp_path, bf16=True, rate_weight=0.3)
    tensors = dict(trainer._named_state())
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_what_is_saved_is_a_plain_model(tmp_path):
    trainer = train(tmp_path)
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    pixels = torch.randn(4, 3, 8, 8)
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, trainer.model(pixels).logits, rtol=1e-4, atol=1e-5)
    assert latent_layers(trainer.model)
    assert not latent_layers(loaded)
    trainer.model.save_pretrained(tmp_path / "own")  # as users do
    own, info = AutoModelForImageClassification.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for (name, a), b in zip(loaded.state_dict().items(), own.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_frozen_layers_stay_what_they_are(tmp_path):
    model = tiny_resnet()
    frozen = model.resnet.embedder.embedder.convolution
    frozen.weight.requires_grad_(False)
    before = frozen.weight.detach().clone()
    trainer = make(tmp_path, model, slice_weight=1.0, l2_weight=1.0, rate_weight=1.0)
    trainer.train()
    family = trainer.build_family()
    hfc.load_family(family.folder)
    coded = AutoModelForImageClassification.from_pretrained(family.path_to("lilnetx"))
    for kept in (trainer._plain(), coded):
        assert torch.equal(kept.resnet.embedder.embedder.convolution.weight, before)
    assert not trainer._plain().resnet.embedder.embedder.convolution.weight.requires_grad


def test_the_best_model_is_loaded_with_its_latents(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = train(tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-5)


def test_patterns_are_evaluated_on_plain_weights(tmp_path):
    trainer = train(tmp_path, eval_patterns=["unstructured:0.5"])
    before = {n: t.clone() for n, t in trainer._named_state()}
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_unstructured-0.50_accuracy"] <= 1
    assert metrics["eval_unstructured-0.50_loss"] != metrics["eval_loss"]
    assert all(torch.equal(before[n], t) for n, t in trainer._named_state())


@pytest.mark.parametrize("make_model", [tiny_resnet, tiny_vit])
def test_family_has_the_dense_model_and_the_coded_one(tmp_path, make_model):
    trainer = train(tmp_path, make_model(), variants=["unstructured:0.5"])
    family = trainer.build_family()
    assert [v.pattern for v in family.variants] == ["lilnetx", "unstructured:0.5"]
    coded = family["lilnetx"]
    assert (coded.revision, coded.storage, coded.loads_with) == ("lilnetx-coded", "coded", "hf_compress")
    assert coded.made_by == "trained"
    assert coded.metrics == family.dense.metrics
    loaded = AutoModelForImageClassification.from_pretrained(family.path_to("lilnetx"))
    dense = AutoModelForImageClassification.from_pretrained(family.path_to(family.dense))
    for (name, a), b in zip(dense.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert latent_layers(trainer.model)  # which can train on


def test_families_of_several_rates_join(tmp_path):
    first = train(tmp_path / "a", rate_weight=0.1).build_family()
    second = train(tmp_path / "b", rate_weight=1.0, variant="lilnetx:small").build_family()
    joined = first.add(second)
    assert [v.revision for v in joined.variants] == ["lilnetx-coded", "lilnetx-small-coded"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "zeros"}, "init is one of pretrained, uniform, normal, got 'zeros'"),
        ({"decoders": "all"}, "decoders is one of kind, layer, got 'all'"),
        ({"slice_order": "l3"}, "slice_order is one of l1, l2, linf, got 'l3'"),
        ({"rate_weight": -1.0}, "rate_weight must be a number of at least 0, got -1.0"),
        ({"rate_ratio": math.nan}, "rate_ratio must be a number of at least 0, got nan"),
        ({"rate_latents": 0}, "rate_latents must be a whole number of at least 1, got 0"),
        ({"variant": "int8"}, 'variant is "lilnetx" or "lilnetx:LABEL"'),
        ({"variant": "lilnetx:../x"}, "a label has small letters"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_what_does_not_fit_is_named_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="in which latents would not move"):
        make(tmp_path, tiny_resnet().bfloat16())
    with pytest.raises(ValueError, match="which a model_init would replace; pass a model"):
        hfc.LilNetXTrainer(model_init=lambda trial: tiny_resnet(), args=config(tmp_path), train_dataset=image_samples())
    model, data = tiny_resnet(), image_samples()
    optimizers = torch.optim.SGD(model.parameters(), 0.1), None
    with pytest.raises(
        ValueError, match="LilNetX makes new parameters, which the optimizer that is passed does not know"
    ):
        hfc.LilNetXTrainer(model=model, args=config(tmp_path), train_dataset=data, optimizers=optimizers)
    optimizers = torch.optim.SGD(model.parameters(), 0.1), None  # of the model as it is now
    hfc.LilNetXTrainer(model=model, args=config(tmp_path), train_dataset=data, optimizers=optimizers)


def test_checkpoints_of_others_are_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    train(tmp_path, **options)
    with pytest.raises(ValueError, match=r"no latent.*of this model; resume with the model and the flags"):
        make(tmp_path, tiny_vit(), **options).train(resume_from_checkpoint=True)
    path = tmp_path / "checkpoint-6" / "lilnetx.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is no checkpoint of a LilNetXTrainer, or was damaged"):
        make(tmp_path, **options).train(resume_from_checkpoint=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"is no checkpoint of a LilNetXTrainer"):
        make(tmp_path, **options).train(resume_from_checkpoint=True)


def test_a_pattern_that_only_training_makes_is_refused_in_one_shot():
    with pytest.raises(ValueError, match="lilnetx is made by a training, not in one shot: use LilNetXTrainer"):
        hfc.compress(tiny_resnet(), "lilnetx")


def test_the_recipe_in_the_manifest_trains_alike(tmp_path):
    family = train(tmp_path, rate_weight=0.5, linear_slice=4).build_family()
    recipe = json.loads((family.folder / "family.json").read_text())["recipe"]
    assert (recipe["rate_weight"], recipe["linear_slice"]) == (0.5, 4)


def test_needless_filters_are_left_out_and_the_rest_takes_16_bits(tmp_path):
    options = {"remove": True, "half_rest": True, "fold_batch_norm": True}
    trainer = make(tmp_path, **options)
    layers = {layer.path: layer for layer in latent_layers(trainer.model)}
    reader = layers["resnet.encoder.stages.1.layers.0.layer.1.convolution"]
    with torch.no_grad():
        reader.latent[:, [4, 7]] = 0.4 * reader.decoded.gain  # which rounds to nothing
    family = trainer.build_family()
    coded, dense = family["lilnetx"], family.dense
    assert coded.parameters_removed == 2 * (9 * 8 + 2 + 9 * 12)
    assert coded.metrics["accuracy"] == dense.metrics["accuracy"]
    assert coded.metrics["loss"] == pytest.approx(dense.metrics["loss"], abs=2e-3)
    small = AutoModelForImageClassification.from_pretrained(family.path_to("lilnetx"))
    whole = AutoModelForImageClassification.from_pretrained(family.path_to(dense))
    kept = [i for i in range(12) if i not in (4, 7)]
    first = reader.path.replace("layer.1", "layer.0")
    assert torch.equal(small.get_parameter(f"{first}.weight"), whole.get_parameter(f"{first}.weight")[kept])
    assert torch.equal(
        small.get_parameter(f"{reader.path}.weight"), whole.get_parameter(f"{reader.path}.weight")[:, kept]
    )
    norm = small.resnet.embedder.embedder.normalization
    assert (norm.running_var == 1).all()
    assert torch.equal(norm.weight.half().float(), norm.weight)
