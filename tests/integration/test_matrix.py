"""Every cell of the README's matrix: the method trains the model for it and its family loads, or it refuses."""

from __future__ import annotations

import re

import pytest
import torch

import hf_compress as hfc
from tests.conftest import ROOT, image_samples, text_samples, tiny_bert, tiny_resnet, tiny_vit
from tests.report.nets import gpt2, llama, timm_resnet

README = (ROOT / "README.md").read_text()
MODELS = {
    "ResNet": tiny_resnet,
    "ResNet of timm": timm_resnet,
    "ViT": tiny_vit,
    "BERT": tiny_bert,
    "GPT-2": gpt2,
    "Llama": llama,
}
CRAM = ("unstructured:0.5", "2:4", "filters:0.5", "neurons:0.5", "heads:0.5", "low_rank:0.5", "int8")
GROUPS = ("filters:0.5", "neurons:0.5", "heads:0.5")
ROWS = {  # as the README names them: what a row trains with
    **{f"CrAM, `{p}`": ("CrAM", p, {"patterns": [p]}) for p in CRAM},
    "SFW, `unstructured:0.5`": ("SFW", "unstructured:0.5", {"constraint": "k_support"}),
    **{f"SFW, `{p}`": ("SFW", p, {"constraint": "group_k_support", "group_by": p.split(":")[0]}) for p in GROUPS},
    "SFW, `low_rank:0.5`": ("SFW", "low_rank:0.5", {"constraint": "spectral_k_support"}),
    **{f"TPP, `{p}`": ("TPP", p, {"patterns": [p], "grow_steps": 1, "stabilize_steps": 1}) for p in GROUPS},
    "LilNetX, coded": ("LilNetX", None, {"entropy_fit_steps": 2}),
}
PLAIN = {
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
}


def samples(model):
    if hasattr(model.config, "vocab_size"):
        rows = text_samples()
        return rows if model.config.num_labels == 3 else [{**row, "labels": row["input_ids"]} for row in rows]
    size = 32 if "timm" in type(model).__name__.lower() else 8
    return image_samples(size=size)


def trained(folder, build, method, pattern, flags):
    model = build().float()
    data = samples(model)
    one_shot = [pattern] if method in ("CrAM", "SFW") else []
    args = getattr(hfc, f"{method}Config")(str(folder), **{**PLAIN, "variants": one_shot, **flags})
    trainer = getattr(hfc, f"{method}Trainer")(model=model, args=args, train_dataset=data, eval_dataset=data[:8])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    (folder / "trained").touch()
    after = dict(trainer.model.named_parameters())
    assert any(name not in after or not torch.equal(p, after[name]) for name, p in before.items())
    return trainer


def cell(folder, row, build):
    """Train, cut, and load the variant from its files."""
    method, pattern, flags = ROWS[row]
    trainer = trained(folder, build, method, pattern, flags)
    is_trained = method in ("TPP", "LilNetX")
    family = trainer.build_family() if is_trained else trainer.build_family([pattern])
    (variant,) = family.variants
    model, info = type(build()).from_pretrained(folder / "_family" / variant.path, output_loading_info=True)
    assert not any(info.values())
    assert variant.metrics["loss"] == pytest.approx(trainer.evaluate_variant(model.eval())["loss"], abs=1e-4)
    if method == "TPP":
        assert variant.parameters_removed > 0
    elif method == "LilNetX":
        assert variant.bytes < family.dense.bytes
    elif pattern.startswith(("unstructured", "2:4", *(g.split(":")[0] for g in GROUPS))):
        assert variant.nonzero < family.dense.nonzero


def stated():
    """The cells of the README."""
    (head, body) = re.search(r"^\| trained by, for \| (.*) \|\n\|[- |]+\n((?:\|.*\n)+)", README, re.M).groups()
    rows = (line.strip("| \n").split(" | ") for line in body.splitlines())
    return head.split(" | "), {row: cells for row, *cells in rows}


def test_the_readme_has_all_cells():
    models, rows = stated()
    assert models == list(MODELS)
    assert list(rows) == list(ROWS)
    assert {cell for cells in rows.values() for cell in cells} == {"yes", "no"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("row", ROWS)
def test_a_cell(tmp_path, row, model):
    models, rows = stated()
    if rows[row][models.index(model)] == "yes":
        cell(tmp_path, row, MODELS[model])
    else:
        with pytest.raises(ValueError, match=re.escape(ROWS[row][1])):
            cell(tmp_path, row, MODELS[model])
        assert not any(tmp_path.iterdir())  # nothing was trained, cut or saved
