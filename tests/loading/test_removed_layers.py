"""Checkpoints of models that have lost filters, neurons or heads: the same again, plain where a config says it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as t
from safetensors.torch import save_file

import hf_compress as hfc
from hf_compress.structure import describe, remove, write_description
from tests.loading.conftest import TIMM, bits, load, same_logits
from tests.structure.conftest import SIZES, distilbert, llama, vit


def timm(architecture, **arguments):
    config = t.TimmWrapperConfig(architecture=architecture, num_labels=3, model_args=arguments, architectures=[TIMM])
    return t.TimmWrapperForImageClassification(config)


def timm_vit():
    return timm("vit_tiny_patch16_224", img_size=64, patch_size=32, embed_dim=16, depth=2, num_heads=4)


def gpt2():
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24}
    return t.GPT2LMHeadModel(t.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


BUILDS = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**SIZES, num_labels=3)),
    "distilbert": lambda: t.DistilBertForSequenceClassification(distilbert().config),
    "vit": lambda: t.ViTForImageClassification(vit().config),
    "llama": lambda: t.LlamaForCausalLM(llama().config),
    "gpt2": gpt2,
    "timm-vit": timm_vit,
    "timm-resnet": lambda: timm("resnet10t"),
    "timm-mobilenet": lambda: timm("mobilenetv3_small_050"),
}
PLAIN = ["bert neurons:0.5", "distilbert neurons:0.5", "vit neurons:0.5", "llama neurons:0.5", "gpt2 neurons:0.5"]
PLAIN += ["vit heads:0.5", "llama heads:0.5", "timm-vit neurons:0.5"]
DESCRIBED = ["bert heads:0.5", "distilbert heads:0.5", "gpt2 heads:0.5", "timm-vit heads:0.5"]
DESCRIBED += ["timm-resnet filters:0.5", "timm-mobilenet filters:0.5"]


@pytest.fixture(scope="module")
def removed(tmp_path_factory):
    """For each case the model and a folder with its checkpoint."""
    made = {}
    for case in (*PLAIN, *DESCRIBED):
        name, pattern = case.split()
        t.set_seed(0)
        model = BUILDS[name]().eval()
        assert hfc.compress(model, pattern, remove=True).parameters_removed > 0
        folder = tmp_path_factory.mktemp(case.replace(":", "-"))
        model.save_pretrained(folder)
        made[case] = model, folder
    return made


@pytest.mark.parametrize("case", [*PLAIN, *DESCRIBED])
def test_from_disk_it_is_the_same_model_again_and_again(removed, tmp_path, case):
    model, folder = removed[case]
    loaded, info = load(folder, output_loading_info=True)
    assert not any(info.values())
    assert bits(loaded) == bits(model)
    assert same_logits(loaded, model)
    assert describe(loaded) == describe(model)
    assert bool(describe(model)) == (case in DESCRIBED) == ("quantization_config" in config_of(folder))
    loaded.save_pretrained(tmp_path)
    assert same_logits(load(tmp_path), model)
    half = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


WITHOUT_US = """
import sys
sys.modules["hf_compress"] = None
import torch, transformers
for folder in sys.argv[1:]:
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    try:
        model = getattr(transformers, name).from_pretrained(folder)
        print(sum(p.double().abs().sum().item() for p in model.parameters()))
    except RuntimeError as error:
        print("mismatched" if "size mismatch" in str(error) or "mismatched" in str(error) else error)
"""


def test_without_us_plain_ones_load_and_the_others_fail(removed):
    folders = [str(removed[case][1]) for case in (*PLAIN, *DESCRIBED)]
    done = subprocess.run([sys.executable, "-c", WITHOUT_US, *folders], capture_output=True, text=True)
    printed = done.stdout.split("\n")[:-1]
    assert printed[len(PLAIN) :] == ["mismatched"] * len(DESCRIBED), done.stderr
    for case, found in zip(PLAIN, printed, strict=False):
        assert float(found) == pytest.approx(sum(p.double().abs().sum().item() for p in removed[case][0].parameters()))


WITH_US = """
import sys
import torch, transformers, hf_compress
from safetensors.torch import load_file
for folder in sys.argv[1:]:
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    stored = load_file(folder + "/example/logits.safetensors")
    wanted = stored.pop("wanted")
    with torch.no_grad():
        found = model(**stored)[0]
    print(bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max()))
"""


def test_importing_us_is_enough_in_a_fresh_process(removed):
    for case in DESCRIBED:
        model, folder = removed[case]
        ids = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
        inputs = {"pixel_values": torch.randn(2, 3, 64, 64)} if "timm" in case else {"input_ids": ids}
        with torch.no_grad():
            wanted = model(**inputs)[0].contiguous()
        (folder / "example").mkdir()
        save_file({**inputs, "wanted": wanted}, folder / "example" / "logits.safetensors")
    folders = [str(removed[case][1]) for case in DESCRIBED]
    done = subprocess.run([sys.executable, "-c", WITH_US, *folders], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * len(DESCRIBED), done.stderr


def test_a_pipeline_and_the_bare_body(removed):
    from PIL import Image

    model, folder = removed["timm-resnet filters:0.5"]
    processor = t.ViTImageProcessor(size={"height": 64, "width": 64})
    answer = t.pipeline("image-classification", model=str(folder), image_processor=processor)(
        Image.new("RGB", (64, 64)), top_k=3
    )
    assert sorted(a["label"] for a in answer) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert describe(t.AutoModel.from_pretrained(folder)) == describe(model)


def test_different_widths_are_described_and_equal_ones_after_them_are_plain(tmp_path):
    model = BUILDS["bert"]().eval()
    remove(model, {"bert.encoder.layer.0.intermediate.dense": [0, 7]})
    write_description(model)
    assert "quantization_config" in model.config.to_dict()
    remove(model, {"bert.encoder.layer.1.intermediate.dense": [3, 4]})
    write_description(model)
    model.save_pretrained(tmp_path)
    config = config_of(tmp_path)
    assert config["intermediate_size"] == 22
    assert "quantization_config" not in config
    assert same_logits(load(tmp_path), model)


HEADS = "bert.encoder.layer.0.attention.self"
NORM, CONV = "timm_model.layer1.0.bn1", "timm_model.layer1.0.conv1"


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("bert heads:0.5", {f"{HEADS}.value": {"out_features": -8}}, "a number from 1 to 16, got -8"),
        ("bert heads:0.5", {f"{HEADS}.value": {"out_features": 10**15}}, "a number from 1 to 16, got 1000000000000000"),
        ("bert heads:0.5", {f"{HEADS}.value": {"out_features": True}}, "a number from 1 to 16, got True"),
        ("bert heads:0.5", {f"{HEADS}.value": {"out_features": "8"}}, "a number from 1 to 16, got '8'"),
        ("bert heads:0.5", {f"{HEADS}.value": {}}, "a Linear, is described by \\[\\]"),
        ("bert heads:0.5", {f"{HEADS}.value": {"weight": 8}}, "known of it are \\['in_features', 'out_features'\\]"),
        ("bert heads:0.5", {HEADS: {"forward": 1}}, "known of it are \\['all_head_size', 'num_attention_heads'\\]"),
        ("bert heads:0.5", {HEADS: {"num_attention_heads": 5}}, "a number from 1 to 4, got 5"),
        ("bert heads:0.5", {"bert.embeddings.LayerNorm": {"normalized_shape": 8}}, "known of it is nothing"),
        ("bert heads:0.5", {"bert.encoder.layer.9.output": {"out_features": 8}}, "is no layer of this model"),
        ("timm-resnet filters:0.5", {NORM: {"num_features": 0}}, "num_features of .* is a number from 1 to"),
        ("timm-resnet filters:0.5", {CONV: {"kernel_size": 1}}, "known of it are \\['in_channels', 'out_channels'\\]"),
        (
            "timm-mobilenet filters:0.5",
            {"timm_model.blocks.1.0.conv_dw": {"groups": 8, "in_channels": 4, "out_channels": 8}},
            "has as many groups as channels",
        ),
    ],
)
def test_a_hostile_config_is_an_error(removed, tmp_path, case, changes, message):
    folder = with_layers(removed[case][1], tmp_path, {name: {"kind": "removed", **f} for name, f in changes.items()})
    with pytest.raises(ValueError, match=f"quantization_config of this checkpoint is wrong.*{message}.*--upgrade"):
        load(folder)


def with_layers(folder, destination, changes):
    shutil.copytree(folder, destination, dirs_exist_ok=True)
    config = config_of(destination)
    config["quantization_config"]["layers"] |= changes
    (destination / "config.json").write_text(json.dumps(config))
    return destination


@pytest.mark.parametrize("size", [4, 12])
def test_a_description_that_is_not_of_these_weights(removed, tmp_path, size):
    changes = {f"{HEADS}.value": {"kind": "removed", "out_features": size}}
    with pytest.raises(RuntimeError, match="mismatch"):
        load(with_layers(removed["bert heads:0.5"][1], tmp_path, changes))


def test_a_layer_that_has_lost_rows_is_not_factored_but_others_are(tmp_path):
    model = BUILDS["bert"]().eval()
    hfc.compress(model, "heads:0.5", remove=True)
    report = hfc.compress(model, "low_rank:0.75", remove=True)
    assert "it has lost outputs or inputs already" in report.skipped[f"{HEADS}.value.weight"]
    assert report.parameters_removed > 0
    model.save_pretrained(tmp_path)
    assert same_logits(load(tmp_path), model)
