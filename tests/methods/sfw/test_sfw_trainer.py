"""SFW in the Trainer: accumulation, the log, resume, the start's report, and what is refused."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

import hf_compress as hfc
from hf_compress.methods.sfw import create_sfw
from tests.conftest import image_samples, tiny_resnet, tiny_vit


def config(folder, **overrides):
    fields = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "constraint": "k_support",
        "k": "0.2",
        "radius": "init:1",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return hfc.SFWConfig(**{**fields, **overrides})


def train(folder, model=None, trainer_class=hfc.SFWTrainer, resume=None, **overrides):
    args = config(folder, **overrides)
    trainer = trainer_class(model=model or tiny_vit(), args=args, train_dataset=image_samples())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def largest_difference(a, b):
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


def test_a_window_of_four_is_a_batch_of_four_times_the_size(tmp_path):
    whole = train(tmp_path)
    window = train(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert largest_difference(whole, window) < 1e-6
    assert largest_difference(whole, train(tmp_path, per_device_train_batch_size=4)) > 1e-3


@pytest.mark.parametrize("constraint", ["k_sparse", "spectral_k_support", "group_k_support"])
def test_weights_are_inside_their_regions_after_the_training(tmp_path, constraint):
    trainer = train(tmp_path, tiny_resnet(), constraint=constraint)
    regions = [g for g in trainer.sfw.param_groups if g["constraint"] is not None]
    assert len(regions) == len(hfc.find_targets(trainer.model))
    for group in regions:
        gauge = group["constraint"].gauge([p.detach() for p in group["params"]])
        assert gauge <= group["constraint"].size.value * (1 + 1e-5)


def test_the_log_has_the_gap_of_the_steps_that_are_logged(tmp_path):
    trainer = train(tmp_path, logging_steps=2, max_steps=5)
    gaps = {row["step"]: row["fw_gap"] for row in trainer.state.log_history if "fw_gap" in row}
    assert list(gaps) == [2, 4]
    assert all(gap > 0 for gap in gaps.values())


@pytest.mark.parametrize(
    "flags",
    [
        {"constraint": "k_support"},
        {"constraint": "spectral_k_support"},
        {"constraint": "group_k_support", "group_by": "neurons"},
        {"radius": "weights:1"},  # of the weights at the start, not of those of the checkpoint
        {"sfw_init_steps": 2, "sfw_init_learning_rate": 0.1},
    ],
    ids=lambda flags: " ".join(map(str, flags.values())),
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, flags):
    whole = train(tmp_path, **flags, save_strategy="steps", save_steps=2)
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = train(tmp_path / "again", **flags, resume=checkpoint)
    assert largest_difference(whole, resumed) == 0
    with pytest.raises(ValueError, match="resume with the settings of the first run"):
        train(tmp_path / "other", **flags, k="0.3", resume=checkpoint)


def test_the_radius_of_a_resumed_run_is_that_of_the_first(tmp_path, caplog):
    whole = train(tmp_path, radius="weights:0.5", save_strategy="steps", save_steps=2)
    caplog.clear()
    resumed = train(tmp_path / "again", radius="weights:0.5", resume=str(tmp_path / "checkpoint-2"))
    regions = [[str(group["constraint"]) for group in each.sfw.param_groups] for each in (whole, resumed)]
    assert regions[0] == regions[1]
    assert "scaled down" not in caplog.text
    with pytest.raises(ValueError, match="resume with the settings of the first run"):
        train(tmp_path / "other", radius="weights:0.6", resume=str(tmp_path / "checkpoint-2"))


def test_neurons_are_trained_in_balls_and_cut(tmp_path, caplog):
    logging.getLogger("hf_compress").propagate = True
    with caplog.at_level(logging.INFO, logger="hf_compress"):
        trainer = train(tmp_path, max_steps=2, constraint="group_k_support", group_by="neurons", k="0.5")
    report = [r.getMessage() for r in caplog.records if "mlp.fc1.weight, " in r.getMessage()]
    assert [line.partition("fc2.weight")[2][:51] for line in report] == [
        ": in group_k_support(k=0.5, axes=0 1, groups=24, ra"
    ] * 2
    balls = [g for g in trainer.sfw.param_groups if isinstance(g["constraint"], hfc.methods.sfw.GroupKSupportBall)]
    assert [len(g["params"]) for g in balls] == [2, 2]
    for group in balls:
        gauge = group["constraint"].gauge([p.detach() for p in group["params"]])
        assert gauge <= group["constraint"].size.value * (1 + 1e-5)
    family = trainer.build_family(["neurons:0.5"])
    assert family.recipe["group_by"] == "neurons"
    assert [v.pattern for v in family.variants] == ["neurons:0.5"]


def test_the_start_says_how_much_it_shrank(tmp_path, caplog):
    logging.getLogger("hf_compress").propagate = True
    with caplog.at_level(logging.WARNING):
        train(tmp_path, radius="init:0.02")
    (warning,) = [r.getMessage() for r in caplog.records if "regions did not hold" in r.getMessage()]
    assert "A radius" in warning
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train(tmp_path, radius="init:100")
    assert not [r for r in caplog.records if "regions did not hold" in r.getMessage()]


def test_learning_rate_drops(tmp_path):
    trainer = train(tmp_path, max_steps=6, lr_drops=[0.34, 0.67], learning_rate=0.3)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0.3, 0.3, 0.3, 0.03, 0.03, 0.003], rel=1e-6)


def test_drops_begin_anew_in_a_second_training(tmp_path):
    trainer = train(tmp_path, lr_drops=[0.5])
    first = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    trainer.train()
    assert [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row] == first
    assert len(set(first)) == 2


def test_what_would_not_train_with_sfw_is_refused(tmp_path):
    model, data = tiny_vit(), image_samples()
    parts = {"model": model, "args": config(tmp_path), "train_dataset": data}
    with pytest.raises(ValueError, match="SFW is an optimizer itself, and was given another one"):
        hfc.SFWTrainer(**parts, optimizers=(torch.optim.AdamW(model.parameters()), None))
    with pytest.raises(ValueError, match="SFW is an optimizer itself, and was given another one"):
        hfc.SFWTrainer(**parts, optimizer_cls_and_kwargs=(torch.optim.AdamW, {}))
    own = create_sfw(model, "l2", radius=1)
    trainer = hfc.SFWTrainer(**parts, optimizers=(own, None))
    trainer.train()
    assert trainer.sfw is own
    with pytest.raises(ValueError, match="weights are torch.bfloat16, which rounds the small steps of SFW away"):
        train(tmp_path, tiny_vit().bfloat16())


def test_clipping_is_off_unless_asked_for(tmp_path):
    assert config(tmp_path).max_grad_norm == 0
    free, clipped = train(tmp_path), train(tmp_path, max_grad_norm=1e-3)
    assert largest_difference(free, clipped) > 1e-4  # shorter steps


def test_any_trainer_takes_the_mixin(tmp_path):
    class Mine(Trainer):
        pass

    class MySFW(hfc.SFWMixin, Mine):
        pass

    trainer = train(tmp_path, trainer_class=MySFW)
    assert isinstance(trainer.sfw, hfc.SFW)
    family = trainer.build_family(["unstructured:0.9"], output_dir=tmp_path / "family")
    assert family.method == "sfw"
    assert family.recipe["constraint"] == "k_support(k=0.2, radius=init:1)"


def test_k_may_be_a_number(tmp_path):
    assert [config(tmp_path, k=k).constraint for k in (21, 0.5, "21", "0.5")] == [
        f"k_support(k={k}, radius=init:1)" for k in (21, 0.5, 21, 0.5)
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"k": "many"}, "k is a count such as 21"),
        ({"constraint": "k_sparce"}, "is no constraint"),
        ({"radius": "init:-1"}, "radius must be"),
        ({"scope": "layer"}, "scope must be one of tensor, global"),
        ({"group_by": "neurons"}, r"group_by='neurons' needs the constraint group_k_support, got k_support\("),
        ({"lr_drops": [1.5]}, "lr_drops are shares"),
    ],
)
def test_wrong_flags_fail_when_they_are_read(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **flags)


def test_deepspeed_is_refused_before_the_first_step(tmp_path):
    trainer = hfc.SFWTrainer(model=tiny_vit(), args=config(tmp_path), train_dataset=image_samples())
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="DeepSpeed makes one flat tensor.*DistributedDataParallel"):
        trainer.create_optimizer()
    trainer.is_deepspeed_enabled = False
    trainer.model.is_quantized = True
    with pytest.raises(ValueError, match="quantized"):
        trainer.create_optimizer()
    trainer.model.is_quantized = False
    trainer.is_fsdp_enabled = True
    trainer.accelerator = SimpleNamespace(is_fsdp2=False)
    with pytest.raises(ValueError, match="FSDP1"):
        trainer.create_optimizer()


def test_mixed_precision_keeps_the_weights_inside(tmp_path):
    trainer = train(tmp_path, bf16=True)
    for group in trainer.sfw.param_groups:
        if group["constraint"] is not None:
            assert group["params"][0].dtype == torch.float32
            assert group["constraint"].gauge([group["params"][0].detach()]) <= group["constraint"].size.value * 1.00001
