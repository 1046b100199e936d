"""Which weights are targets, on real architectures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_compress as hfc
from tests.conftest import tiny_resnet, tiny_vit


def tiny_bert(kind, **kw):
    import transformers as t

    config = t.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, **kw
    )
    return getattr(t, kind)(config)


def test_bert_for_questions_has_six_matrices_a_layer():
    targets = hfc.find_targets(tiny_bert("BertForQuestionAnswering"))
    assert len(targets) == 12
    assert all(".layer." in name and t.kind == "linear" and t.reduction_dim == 1 for name, t in targets.items())


def test_masked_language_head_tied_to_the_embedding_is_left_out():
    assert all(name.startswith("bert.") for name in hfc.find_targets(tiny_bert("BertForMaskedLM")))


def test_gpt2_has_conv1d_and_no_lm_head():
    import transformers as t

    model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    targets = hfc.find_targets(model)
    assert len(targets) == 4
    assert all(t.kind == "conv1d" and t.reduction_dim == 0 for t in targets.values())


def test_llama_leaves_out_an_untied_head():
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    names = set(hfc.find_targets(t.LlamaForCausalLM(config)))
    assert len(names) == 7
    assert "lm_head.weight" not in names


def test_the_head_of_a_vision_transformer_is_left_out_and_a_conv_nets_is_not():
    vit, resnet = hfc.find_targets(tiny_vit()), hfc.find_targets(tiny_resnet())
    assert not any("classifier" in name for name in vit)
    assert any("patch_embeddings" in name and t.kind == "conv" for name, t in vit.items())
    assert "classifier.1.weight" in resnet
    assert sum(t.kind == "conv" for t in resnet.values()) == len(resnet) - 1


def test_heads_without_a_backbone_of_their_own_are_left_out():
    import timm
    import transformers as t

    sizes = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    assert "qa_outputs.weight" not in hfc.find_targets(t.T5ForQuestionAnswering(t.T5Config(**sizes)))
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=5)
    assert not [name for name in hfc.find_targets(distilled) if name.startswith("head")]
    mixer = timm.create_model("mixer_s32_224", num_classes=5)
    assert "head.weight" not in hfc.find_targets(mixer)
    class_attention = timm.create_model("cait_xxs24_224", num_classes=5, depth=1)
    assert "head.weight" not in hfc.find_targets(class_attention)


def test_timm_models_bare_and_wrapped():
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    assert "fc.weight" in hfc.find_targets(timm.create_model("resnet10t"))
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5)
    assert not any(name.startswith("head") for name in hfc.find_targets(vit))
    config = TimmWrapperConfig(architecture="resnet20_cifar", num_labels=5, model_args={})
    assert "timm_model.linear.weight" in hfc.find_targets(TimmWrapperForImageClassification(config))


def test_norms_embeddings_biases_and_bare_parameters_are_no_targets():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 4)
            self.norm = nn.LayerNorm(4)
            self.linear = nn.Linear(4, 4)
            self.free = nn.Parameter(torch.ones(4, 4))
            self.up = nn.ConvTranspose2d(4, 4, 2)

    assert list(hfc.find_targets(Net())) == ["linear.weight"]


def test_tied_weights_count_once():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    assert list(hfc.find_targets(nn.Sequential(a, b))) == ["0.weight"]


def test_globs(vit):
    everything = hfc.find_targets(vit)
    only = hfc.find_targets(vit, include=["*mlp*"], exclude=["*layers.1.*"])
    assert only
    assert set(only) == {n for n in everything if "mlp" in n and "layers.1." not in n}
    assert list(hfc.find_targets(vit, include=["classifier"])) == ["classifier.weight"]
    assert hfc.find_targets(vit, include="*mlp*").keys() == hfc.find_targets(vit, include=["*mlp*"]).keys()


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_without_a_weight_is_an_error_that_shows_names(vit, option):
    with pytest.raises(ValueError, match=f"{option}='\\*attnetion\\*' matches no weight.*there are: vit"):
        hfc.find_targets(vit, **{option: ["*attnetion*"]})


def test_wrappers_are_looked_through(mlp):
    names = list(hfc.find_targets(mlp))
    assert list(hfc.find_targets(torch.compile(mlp))) == names
    assert list(hfc.find_targets(nn.DataParallel(mlp))) == names
