"""`--teacher`: the loss by its formula, its scaling, and what it does not touch."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as t
from torch.nn import functional as F

import hf_compress as hfc
from hf_compress.distillation import distances
from tests.conftest import image_samples, text_samples, tiny_bert, tiny_resnet, tiny_vit

METHODS = {"cram": (hfc.CrAMTrainer, hfc.CrAMConfig), "sfw": (hfc.SFWTrainer, hfc.SFWConfig)}
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def tiny_llama(vocab_size=32):
    t.set_seed(0)
    sizes = {**SIZES, "vocab_size": vocab_size, "num_key_value_heads": 2, "num_hidden_layers": 1}
    return t.LlamaForCausalLM(t.LlamaConfig(**sizes, max_position_embeddings=16, pad_token_id=0))


def causal_samples(count=48):
    """Unequal numbers of labels that count."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 32, (count, 8), generator=generator)
    labels = [i.where(torch.arange(8) >= n % 6, -100) for n, i in enumerate(ids)]
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def tiny_answering():
    t.set_seed(0)
    sizes = {**SIZES, "vocab_size": 64, "num_hidden_layers": 1}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return t.BertForQuestionAnswering(t.BertConfig(**sizes, **dropout))


def answering_samples():
    places = torch.randint(0, 12, (48, 2), generator=torch.Generator().manual_seed(3))
    return [
        {"input_ids": s["input_ids"], "start_positions": a, "end_positions": b}
        for s, (a, b) in zip(text_samples(), places, strict=True)
    ]


KINDS = {
    "vit": (tiny_vit, image_samples),
    "resnet": (tiny_resnet, image_samples),
    "bert": (tiny_bert, text_samples),
    "llama": (tiny_llama, causal_samples),
    "answering": (tiny_answering, answering_samples),
}


def save_teacher(folder, model):
    """Another model of its kind."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder / "teacher")
    return str(folder / "teacher")


def make(folder, kind="vit", method="cram", model=None, **options):
    build, samples = KINDS[kind]
    trainer_class, config_class = METHODS[method]
    fields = {
        "output_dir": str(folder / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.05,
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        **({"optim": "sgd"} if method == "cram" else {}),
    }
    given = {key: options.pop(key) for key in ("compute_loss_func",) if key in options}
    args = config_class(**{**fields, **options})
    data = samples()
    return trainer_class(model=model or build(), args=args, train_dataset=data, eval_dataset=data, **given)


def largest_difference(a, b):
    states = a.state_dict(), b.state_dict()
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(*(s.values() for s in states), strict=True))


def test_the_distance_is_the_divergence_of_softened_classes():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    p, q = torch.softmax(teacher.double() / 2, -1), torch.softmax(student.double() / 2, -1)
    wanted = 4 * (p * (p / q).log()).sum(-1)
    assert torch.allclose(distances(student, teacher).double(), wanted, atol=1e-6)
    assert distances(teacher, teacher).abs().max() < 1e-6


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_half_of_each(tmp_path, kind):
    """Written out here for one batch: logits of both, items that count, T = 2."""
    trainer = make(tmp_path, kind, teacher=save_teacher(tmp_path, KINDS[kind][0]()))
    model, teacher, batch = trainer.model.train(), trainer.teacher, batch_of(trainer)
    plain = make(tmp_path, kind, model=model)
    with torch.no_grad():
        task = plain.compute_loss(model, dict(batch))
        found = trainer.compute_loss(model, dict(batch))
        ours, other = model(**batch), teacher(**batch)
    names = ["start_logits", "end_logits"] if kind == "answering" else ["logits"]
    parts = []
    for name in names:
        q, p = ours[name].double(), other[name].double()
        if kind == "llama":
            counts = batch["labels"][:, 1:] != -100
            q, p = q[:, :-1][counts], p[:, :-1][counts]
        each = F.kl_div(F.log_softmax(q / 2, -1), F.softmax(p / 2, -1), reduction="none").sum(-1)
        parts.append(4 * each.mean())
    assert parts[0] > 1e-3
    assert found.item() == pytest.approx((task.item() + sum(map(float, parts)) / len(parts)) / 2, rel=1e-4)


@pytest.mark.parametrize("kind", ["vit", "bert", "llama", "answering"])
def test_accumulation_equals_one_large_batch(tmp_path, kind):
    """Heads that divide by the items of the window, one that ignores them, and one that is not told."""
    teacher = save_teacher(tmp_path, KINDS[kind][0]())
    whole = make(tmp_path, kind, teacher=teacher)
    parts = make(tmp_path, kind, teacher=teacher, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    alone = make(tmp_path, kind)
    for trainer in (whole, parts, alone):
        trainer.train()
    assert largest_difference(whole.model, parts.model) < 2e-6
    assert largest_difference(whole.model, alone.model) > 1e-4
    logs = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (whole, parts)]
    assert logs[0] == pytest.approx(logs[1], abs=1e-3)


def own_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def test_a_loss_function_of_the_users_own(tmp_path):
    """The Trainer takes the labels away from the model, and they still say which items count."""
    teacher = save_teacher(tmp_path, tiny_vit())
    plain, own = (make(tmp_path, teacher=teacher, **o) for o in ({}, {"compute_loss_func": own_loss}))
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    accumulated = make(tmp_path, teacher=teacher, compute_loss_func=own_loss, **parts)
    for trainer in (plain, own, accumulated):
        trainer.train()
    assert largest_difference(plain.model, own.model) < 1e-6
    assert largest_difference(plain.model, accumulated.model) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_training_with_a_teacher(tmp_path, method):
    """It draws the logits to the teacher's, changes nothing of it, and evaluates the task alone."""
    teacher = save_teacher(tmp_path, tiny_vit())
    gaps = {}
    for path in (None, teacher):
        trainer = make(tmp_path, "vit", method, teacher=path, max_steps=30, save_strategy="steps", save_steps=30)
        trainer.train()
        judge = make(tmp_path, teacher=teacher).teacher
        batch = batch_of(trainer)
        with torch.no_grad():
            ours, other = trainer.model.eval()(**batch), judge(**batch)
            gaps[path] = distances(ours.logits, other.logits).mean().item()
            wanted = trainer.model(**batch).loss
            assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert gaps[teacher] < 0.7 * gaps[None]
    saved = type(trainer.model).from_pretrained(teacher)
    assert largest_difference(saved, trainer.teacher) == 0.0
    assert not trainer.teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in trainer.teacher.parameters())
    taught = {id(p) for p in trainer.teacher.parameters()}
    assert not taught & {id(p) for p in trainer.model.parameters()}
    assert not taught & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    checkpoint = type(trainer.model).from_pretrained(tmp_path / "out" / "checkpoint-30")
    assert checkpoint.state_dict().keys() == trainer.model.state_dict().keys()


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    options = {"teacher": save_teacher(tmp_path, tiny_vit()), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path, **options)
    whole.train()
    resumed = make(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert largest_difference(whole.model, resumed.model) == 0.0


def test_half_precision(tmp_path):
    teacher = save_teacher(tmp_path, tiny_bert())
    for options in ({"bf16": True}, {"bf16": True, "model": tiny_bert().bfloat16()}):
        trainer = make(tmp_path, "bert", teacher=teacher, **options)
        trainer.train()
        assert trainer.teacher.dtype == trainer.model.dtype
        assert all(row["loss"] > 0 for row in trainer.state.log_history if "loss" in row)


def test_a_teacher_of_another_size(tmp_path):
    teacher = save_teacher(tmp_path, tiny_vit(hidden_size=32, num_hidden_layers=3))
    make(tmp_path, teacher=teacher).train()


@pytest.mark.parametrize(
    ("kind", "teacher", "message"),
    [
        ("vit", lambda: tiny_vit(num_labels=5), r"the teacher's logits have shape \(16, 5\), the student's \(16, 3\)"),
        ("llama", lambda: tiny_llama(40), r"have shape \(16, 8, 40\), the student's \(16, 8, 32\)"),
    ],
)
def test_a_teacher_of_other_classes(tmp_path, kind, teacher, message):
    trainer = make(tmp_path, kind, teacher=save_teacher(tmp_path, teacher()))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_labels_that_the_teacher_does_not_have_are_no_matter_for_it(tmp_path):
    """Labels 0 to 2, and a teacher of two classes: the shapes are named before its loss fails."""
    trainer = make(tmp_path, teacher=save_teacher(tmp_path, tiny_vit(num_labels=2)))
    with pytest.raises(ValueError, match=r"shape \(16, 2\), the student's \(16, 3\)"):
        trainer.train()


def test_a_path_that_is_no_teacher(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere' is no folder or Hub id that ViTForImageClassification can load"):
        make(tmp_path, teacher=str(tmp_path / "nowhere"))
    other = save_teacher(tmp_path, tiny_resnet())
    with pytest.raises(ValueError, match="is no trained ViTForImageClassification: it lacks"):
        make(tmp_path, teacher=other)
    tiny_bert().bert.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="it lacks 2 weights, first classifier.bias"):
        make(tmp_path, "bert", teacher=str(tmp_path / "headless"))


def test_outputs_without_classes(tmp_path):
    class Headless(t.ViTForImageClassification):
        def forward(self, pixel_values=None, labels=None):
            hidden = super().forward(pixel_values).logits
            return {"loss": None if labels is None else F.cross_entropy(hidden, labels), "hidden": hidden}

    teacher = save_teacher(tmp_path, tiny_vit())
    with pytest.raises(ValueError, match="name contains 'logits', and the model gives loss, hidden"):
        make(tmp_path, model=Headless(tiny_vit().config), teacher=teacher).train()
    many = {"problem_type": "multi_label_classification"}
    trainer = make(tmp_path, model=tiny_vit(**many), teacher=teacher)
    trainer.train_dataset = [{**s, "labels": F.one_hot(s["labels"], 3).float()} for s in image_samples()]
    with pytest.raises(ValueError, match="is trained for multi_label_classification"):
        trainer.train()


def test_a_model_that_transformers_cannot_load(tmp_path, mlp):
    with pytest.raises(ValueError, match="Sequential has no from_pretrained"):
        make(tmp_path, model=mlp, teacher="somewhere")


def test_the_folder_of_a_teacher_stays_out_of_the_manifest(tmp_path):
    trainer = make(tmp_path, teacher=save_teacher(tmp_path, tiny_vit()), max_steps=1)
    family = trainer.build_family(["2:4"])
    assert str(tmp_path) not in json.dumps(family.recipe)
    assert set(family.dense.metrics) == {"loss"}


def test_the_trainer_knows_which_labels_are_shifted(tmp_path):
    assert make(tmp_path, "llama")._loss_shifts_labels is True
    assert make(tmp_path, "vit")._loss_shifts_labels is False


def test_a_trainer_of_trl(tmp_path):
    """It computes its loss without logits, and returns some without gradient."""
    pytest.importorskip("trl")
    from tests.sft import tiny_causal_model
    from tests.tasks.test_supervised_finetuning import make as make_sft

    llama = tiny_causal_model(tmp_path / "llama")
    teacher = save_teacher(tmp_path, t.AutoModelForCausalLM.from_pretrained(llama))
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainers = [make_sft(llama, tmp_path, **o) for o in ({}, {"teacher": teacher}, {"teacher": teacher, **parts})]
    for trainer in trainers:
        trainer.train()
    alone, whole, accumulated = (trainer.model for trainer in trainers)
    assert largest_difference(whole, accumulated) < 2e-6
    assert largest_difference(whole, alone) > 1e-3
    batch = {k: v for k, v in batch_of(trainers[0]).items() if k != "labels"}
    with torch.no_grad():
        gaps = [distances(m.eval()(**batch).logits, trainers[1].teacher(**batch).logits).mean() for m in (alone, whole)]
    assert gaps[1] < gaps[0]


def test_logits_without_gradient_are_refused(tmp_path):
    class Detached(hfc.CrAMMixin, type("Behind", (t.Trainer,), {"compute_loss": detached})):
        pass

    options = {"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, "disable_tqdm": True}
    args = hfc.CrAMConfig(**options, teacher=save_teacher(tmp_path, tiny_vit()))
    with pytest.raises(ValueError, match="needs logits that have a gradient"):
        Detached(model=tiny_vit(), args=args, train_dataset=image_samples()).train()


def detached(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
    loss = outputs.loss
    outputs["logits"] = outputs.logits.detach()
    return (loss, outputs) if return_outputs else loss
