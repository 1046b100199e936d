"""LoRA merged into pruned models: the zeros of the base, and everything else as PEFT merges it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, set_seed

import hf_compress as hfc
from tests.callbacks import runs
from tests.callbacks.runs import changed, count, zeros
from tests.conftest import tiny_resnet


def tiny_gpt2():
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16))
    hfc.compress(model, "2:4")
    return model


def pruned_resnet():
    model = tiny_resnet()
    hfc.compress(model, "unstructured:0.6")
    return model


class Attention(nn.Module):
    """torch's own attention, of which only the output projection is a layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def adapted(model, **fields):
    """Adapters whose two factors are both random, as after a training."""
    torch.manual_seed(1)
    return randomised(peft.get_peft_model(model, peft.LoraConfig(r=4, **fields)))


def randomised(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def check(model, base, adapted_names):
    """`base` is the model before PEFT; returns the merged one."""
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    wanted = copy.deepcopy(model).merge_and_unload().state_dict()
    merged = hfc.merge_lora(model)
    found = merged.state_dict()
    assert found.keys() == wanted.keys() == base.state_dict().keys()
    touched = set()
    for name, value in found.items():
        mask = before[name] == 0 if name in adapted_names else torch.zeros_like(value, dtype=torch.bool)
        assert not value[mask].any()
        assert torch.equal(value[~mask], wanted[name][~mask])
        if wanted[name][mask].any():
            touched.add(name)
    assert touched == set(adapted_names)  # the negative control: PEFT's own merge fills the zeros
    return merged


def names(model, *parts):
    return [n for n, p in model.named_parameters() if any(f"{part}.weight" in n for part in parts) and p.ndim > 1]


@pytest.mark.parametrize(
    ("make", "modules"),
    [
        (runs.pruned_vit, ["q_proj", "fc1", "fc2"]),
        (tiny_gpt2, ["c_attn", "c_fc"]),
        (pruned_resnet, ["convolution"]),
    ],
    ids=["linear", "gpt2", "conv"],
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_zeros_stay_and_all_else_is_what_peft_merges(make, modules, dora):
    base = make()
    fan = {"fan_in_fan_out": True} if make is tiny_gpt2 else {}
    model = adapted(copy.deepcopy(base), target_modules=modules, use_dora=dora, **fan)
    merged = check(model, base, names(base, *modules))
    assert type(merged) is type(base)
    assert not any("lora" in n for n, _ in merged.named_modules())


def test_torchs_attention_keeps_the_zeros_of_its_output_projection():
    base = Attention()
    hfc.compress(base, "unstructured:0.5", include=["*"])
    model = adapted(copy.deepcopy(base), target_modules=["attention"])
    check(model, base, ["attention.out_proj.weight"])


def test_half_precision():
    base = runs.pruned_vit().bfloat16()
    check(adapted(copy.deepcopy(base), target_modules=["q_proj", "fc1"]), base, names(base, "q_proj", "fc1"))


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]])
def test_of_several_adapters_the_active_ones_are_merged(active):
    base = runs.pruned_vit()
    model = adapted(copy.deepcopy(base), target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    model.base_model.set_adapter(active)
    check(randomised(model), base, names(base, "q_proj", *(["fc1"] if "other" in active else [])))


def test_a_copied_head_is_the_one_that_was_trained():
    """Its zeros are its own: what it has learned is not masked."""
    base = runs.pruned_vit()
    hfc.compress(base, "unstructured:0.5", include=["classifier"])
    model = adapted(copy.deepcopy(base), target_modules=["q_proj"], modules_to_save=["classifier"])
    with torch.no_grad():
        trained = model.get_parameter("base_model.model.classifier.modules_to_save.default.weight").fill_(2.0)
    merged = check(model, base, names(base, "q_proj"))
    assert torch.equal(merged.classifier.weight, trained)


def test_a_trained_bias_of_lora_is_merged_whole():
    base = runs.pruned_vit()
    model = adapted(copy.deepcopy(base), target_modules=["fc1"], lora_bias=True)
    merged = check(model, base, names(base, "fc1"))
    assert merged.vit.layers[0].mlp.fc1.bias.all()


def test_a_trained_adapter_merges_saves_and_loads_plainly(tmp_path):
    base = runs.pruned_vit("2:4")
    before = zeros(base)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    runs.stock(tmp_path, model, [hfc.SparsityLock()], max_steps=10).train()
    merged = hfc.merge_lora(model)
    assert torch.equal(*(torch.cat([m.flatten() for m in z.values()]) for z in (before, zeros(merged))))
    assert not torch.equal(merged.vit.layers[0].mlp.fc1.weight, base.vit.layers[0].mlp.fc1.weight)
    merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    loaded, info = type(base).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert runs.same(loaded, merged)
    runs.stock(tmp_path, loaded, [hfc.SparsityLock()], max_steps=10).train()
    assert changed(before, zeros(loaded)) == 0


def test_gpt2_from_its_folder(tmp_path):
    """The way of a user: adapter and base from disk, merged, saved, loaded, and still 2:4."""
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    model = adapted(copy.deepcopy(base), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = hfc.merge_lora(peft.PeftModel.from_pretrained(again, tmp_path / "adapter"))
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    masks = zeros(loaded)
    assert count(masks) == count(zeros(base)) == sum(m.numel() for m in masks.values()) // 2
    assert all(m.movedim(0, -1).unflatten(-1, (-1, 4)).sum(-1).eq(2).all() for m in masks.values())


def test_a_dense_model_is_merged_as_peft_does():
    base = tiny_resnet()
    model = adapted(base, target_modules=["convolution"])
    wanted = copy.deepcopy(model).merge_and_unload()
    assert runs.same(hfc.merge_lora(model), wanted)


def test_what_is_no_lora_is_named():
    with pytest.raises(ValueError, match=r"takes a peft.PeftModel with LoRA adapters, got a ViTForImageClassif"):
        hfc.merge_lora(runs.pruned_vit())
    model = peft.get_peft_model(runs.pruned_vit(), peft.IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"]))
    with pytest.raises(ValueError, match="got a PeftModel around a IA3Model"):
        hfc.merge_lora(model)


def test_what_was_merged_before_has_lost_its_zeros():
    model = adapted(runs.pruned_vit(), target_modules=["fc1"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"vit.layers.0.mlp.fc1 is merged already.*before merge_adapter"):
        hfc.merge_lora(model)


def test_quantized_weights_are_refused():
    model = adapted(runs.pruned_vit(), target_modules=["fc1"])
    layer = model.base_model.model.vit.layers[0].mlp.fc1.base_layer
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"fc1 is torch.int8; load it without quantization"):
        hfc.merge_lora(model)
