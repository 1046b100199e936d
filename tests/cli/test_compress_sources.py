"""`hf-compress compress`: flags that would change nothing, and what comes with checkpoints of all kinds."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import hf_compress as hfc
from hf_compress.cli import run
from hf_compress.hub.card import render_card
from hf_compress.page.snippet import class_of
from hf_compress.report import inspect_checkpoint
from tests.cli.conftest import failure
from tests.conftest import image_samples, tiny_bert, tiny_resnet
from tests.text import tiny_tokenizer


@pytest.fixture
def bert(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("flags", [["--fold_batch_norm"], ["--fold_batch_norm", "--half_rest"]])
def test_folded_variants_have_statistics_of_their_own(tmp_path, capsys, flags):
    from transformers import AutoModelForImageClassification

    model, samples = tiny_resnet().eval(), torch.stack([s["pixel_values"] for s in image_samples()])
    data = [{"pixel_values": 2 * samples + 1}]
    hfc.recalibrate_batch_norm(model, data)
    patterns = ["unstructured:0.8", "unstructured:0.5"]
    source = hfc.build_family(model, patterns, None, data, tmp_path / "source")
    argv = ["compress", str(source.path_to(source.dense)), "--output_dir", str(tmp_path / "out"), *flags]
    assert run([*argv, *(f"--pattern={p}" for p in patterns)]) == 0
    assert "batch norms keep" not in capsys.readouterr().out
    family = hfc.load_family(tmp_path / "out")
    found, wanted = (
        [
            AutoModelForImageClassification.from_pretrained(each.path_to(v)).eval()(samples).logits
            for v in each.checkpoints
        ]
        for each in (family, source)
    )
    for own, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, expected, rtol=5e-3, atol=5e-3)
    config = hfc.HfCompressConfig("unstructured:0.8")  # whose statistics are for the dense checkpoint as it was
    slid = AutoModelForImageClassification.from_pretrained(family.folder / "dense", quantization_config=config)
    torch.testing.assert_close(slid.eval()(samples).logits, wanted[1])
    assert not torch.equal(slid.resnet.embedder.embedder.normalization.running_var, torch.ones(8))
    folded = AutoModelForImageClassification.from_pretrained(family.path_to("unstructured:0.8"))
    assert torch.equal(folded.resnet.embedder.embedder.normalization.running_var, torch.ones(8))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pattern=2:4", "--pattern=4:8", "--remove"], "2:4, 4:8 writes zeros or rounds: drop it"),
        (["--pattern=neurons:0.5", "--multiple_of=8"], "--multiple_of 8 rounds the widths that --remove leaves"),
        (["--pattern=2:4", "--pattern=4:8", "--multiple_of=-3"], "multiple_of is a whole number of at least 1, got -3"),
        (["--storage=dense", "--include", "nonsense*"], "--include and --exclude choose what a --pattern compresses"),
        (["--storage=dense", "--remove"], "no pattern writes zeros or rounds: drop it"),
        (["--pattern=2:4", "--revision=v1"], "is on this disk, where it has no revisions: --revision is of a Hub id"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(bert, tmp_path, capsys, flags, said):
    message = failure(capsys, "compress", bert, *flags, "--output_dir", tmp_path / "out")
    assert said in message
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


def test_tokenizer_and_image_processor_are_both_kept(tmp_path, capsys):
    import transformers as t

    part = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = t.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=200, bos_token_id=0, eos_token_id=1)
    image = t.ViTConfig(**part, image_size=8, patch_size=4)
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text)
    model = tmp_path / "model"
    t.VisionEncoderDecoderModel(config).save_pretrained(model)
    t.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    argv = ["compress", str(model), "--pattern", "2:4", "--output_dir"]
    assert run([*argv, str(tmp_path / "one")]) == 0
    assert run([*argv, str(tmp_path / "two"), "--pattern", "4:8"]) == 0
    assert "left out" not in capsys.readouterr().err
    for folder in (tmp_path / "one", tmp_path / "two" / "nm-4of8"):
        assert t.AutoImageProcessor.from_pretrained(folder).size["height"] == 8
        assert t.AutoTokenizer.from_pretrained(folder)("a film")["input_ids"]


def test_files_that_are_left_out_are_named(bert, tmp_path, capsys):
    (bert / "1_Pooling").mkdir()
    for name in ("modules.json", "1_Pooling/config.json"):
        (bert / name).write_text("{}")
    argv = ["compress", str(bert), "--pattern", "2:4", "--output_dir"]
    for out, more in (("one", []), ("two", ["--pattern", "4:8"])):
        assert run([*argv, str(tmp_path / out), *more]) == 0
        assert f"left out: modules.json, 1_Pooling/config.json of {bert}, which the output lacks" in (
            capsys.readouterr().err
        )


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_code_of_a_checkpoint_is_never_run(bert, tmp_path, capsys):
    code = "raise SystemExit('run')\n"
    (bert / "code_of_its_own.py").write_text(code)
    edit(bert, model_type="its_own", auto_map={"AutoConfig": "code_of_its_own.C", "AutoModel": "code_of_its_own.M"})
    message = failure(capsys, "compress", bert, "--pattern", "2:4", "--output_dir", tmp_path / "out")
    assert "models with code of their own are not supported" in message
    assert "trust_remote_code" not in message


@pytest.mark.parametrize("name", ["pipeline", "GenerationConfig", "AutoTokenizer", ["x"], 5])
def test_what_is_no_model_is_named(bert, tmp_path, capsys, name):
    edit(bert, architectures=[name])
    message = failure(capsys, "compress", bert, "--pattern", "2:4", "--output_dir", tmp_path / "out")
    assert str(bert) in message
    assert not isinstance(name, str) or f"was saved by {name}, which is no model of transformers" in message


@pytest.mark.parametrize("saved_by", ["timm", "transformers"])
def test_a_timm_checkpoint_without_a_classifier(tmp_path, saved_by):
    import timm
    from transformers import AutoModel, TimmWrapperModel

    net = timm.create_model("resnet20_cifar", num_classes=0, width=4)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors", {"format": "pt"})
    config = {"architecture": "resnet20_cifar", "num_classes": 0, "num_features": 16, "model_args": {"width": 4}}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"input_size": [3, 32, 32]}}))
    if saved_by == "transformers":
        AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
        folder = tmp_path / "again"
    assert run(["compress", str(folder), "--pattern=2:4", "--pattern=4:8", f"--output_dir={tmp_path / 'out'}"]) == 0
    family = hfc.load_family(tmp_path / "out")
    assert class_of(family) == "AutoModel"
    assert isinstance(AutoModel.from_pretrained(family.path_to("2:4")), TimmWrapperModel)
    assert "TimmWrapperModel.from_pretrained" in render_card(family, "me/net")
    assert inspect_checkpoint(str(folder), "2:4").architecture == "TimmWrapperModel"
