"""Afterwards it is a plain model: nothing says how it was loaded, and it does what any model does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers as t

import hf_compress as hfc
from tests.conftest import image_samples, text_samples
from tests.loading.conftest import MODELS, bits, compressed, inputs_of, load, logits_of, slide, zeros


@pytest.mark.parametrize("name", MODELS)
def test_the_object_and_its_configs_are_those_of_a_plain_load(checkpoints, name):
    plain, loaded = load(checkpoints / name), slide(checkpoints / name, "unstructured:0.8")
    assert loaded.is_quantized is False
    assert vars(loaded).keys() - vars(plain).keys() == {"is_quantized"}
    assert vars(plain).keys() <= vars(loaded).keys()
    for a, b in zip(loaded.modules(), plain.modules(), strict=True):
        assert type(a) is type(b)
        assert (a.training, set(a._forward_hooks), set(a._forward_pre_hooks)) == (False, set(), set())
        if hasattr(a, "config"):
            assert vars(a.config) == vars(b.config)
    assert "quantization_config" not in loaded.config.to_dict()
    assert loaded.config.to_json_string() == plain.config.to_json_string()
    if plain.can_generate():
        assert loaded.generation_config == plain.generation_config
    for a, b in zip(loaded.parameters(), plain.parameters(), strict=True):
        assert (a.requires_grad, a.is_contiguous(), vars(a)) == (b.requires_grad, b.is_contiguous(), vars(b))


@pytest.mark.parametrize("name", MODELS)
def test_it_is_cast_and_saved_like_any_model(checkpoints, tmp_path, name):
    loaded, plain = slide(checkpoints / name, "2:4"), load(checkpoints / name)
    before = bits(loaded)
    loaded.save_pretrained(tmp_path / "pruned")
    plain.save_pretrained(tmp_path / "plain")
    files = [sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("pruned", "plain")]
    assert files[0] == files[1]
    assert (tmp_path / "pruned/config.json").read_text() == (tmp_path / "plain/config.json").read_text()
    assert bits(load(tmp_path / "pruned")) == before
    assert {p.dtype for p in loaded.half().parameters()} == {torch.float16}
    assert {p.dtype for p in loaded.to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.to("cpu", torch.float64).parameters()} == {torch.float64}
    assert {p.dtype for p in loaded.float().parameters()} == {torch.float32}
    assert torch.isfinite(logits_of(loaded)).all()


# Runs where hf_compress cannot be imported, with the tests' own inputs.
STRANGER = """
import json, sys
sys.modules["hf_compress"] = None
import torch, transformers as t
out = {}
for folder in sys.argv[2:]:
    model = getattr(t, json.load(open(folder + "/config.json"))["architectures"][0]).from_pretrained(folder).eval()
    inputs = torch.load(folder + "/inputs.pt", weights_only=True)
    with torch.no_grad():
        out[folder] = model(**inputs).logits
torch.save(out, sys.argv[1])
"""


def test_a_saved_copy_needs_no_hf_compress(checkpoints, tmp_path):
    expected = {}
    for name in MODELS:
        folder = tmp_path / name
        loaded = slide(checkpoints / name, "unstructured:0.8")
        loaded.save_pretrained(folder)
        torch.save(inputs_of(loaded), folder / "inputs.pt")
        expected[str(folder)] = logits_of(loaded)
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "out.pt"), *expected]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for folder, logits in expected.items():
        assert torch.equal(found[folder], logits)


def trained(model, samples, folder):
    arguments = t.TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=8, learning_rate=0.01, save_steps=2, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    t.Trainer(model=model, args=arguments, train_dataset=samples).train()
    return model


@pytest.mark.parametrize(("name", "samples"), [("vit", image_samples()), ("bert", text_samples())])
def test_the_stock_trainer_takes_it_like_any_model(checkpoints, tmp_path, name, samples):
    pattern = "unstructured:0.8"
    loaded = trained(slide(checkpoints / name, pattern), samples, tmp_path / "a")
    expected = trained(compressed(checkpoints / name, pattern), samples, tmp_path / "b")
    assert bits(loaded) == bits(expected)
    counts = [sum(int(z.sum()) for z in zeros(m).values()) for m in (loaded, slide(checkpoints / name, pattern))]
    assert counts[0] < 0.1 * counts[1]  # nothing holds them at zero
    saved = [json.loads((tmp_path / f / "checkpoint-2" / "config.json").read_text()) for f in "ab"]
    assert saved[0] == saved[1]


def test_generation(checkpoints):
    ids = torch.tensor([[3, 4, 5]])
    models = slide(checkpoints / "gpt2", "2:4"), compressed(checkpoints / "gpt2", "2:4")
    texts = [m.generate(ids, max_new_tokens=5, do_sample=False).tolist() for m in models]
    assert texts[0] == texts[1]


def test_the_config_of_the_caller_stays(checkpoints):
    asked, config = hfc.HfCompressConfig("2:4"), t.AutoConfig.from_pretrained(checkpoints / "bert")
    before = config.to_dict()
    t.AutoModel.from_pretrained(checkpoints / "bert", config=config, quantization_config=asked)
    assert config.to_dict() == before
    assert asked == hfc.HfCompressConfig("2:4")


MEMORY = """
import sys, threading, time
import torch, transformers as t, hf_compress as hfc

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024

t.AutoModel.from_pretrained(sys.argv[2], quantization_config=hfc.HfCompressConfig("unstructured:0.5"))
before, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
t.AutoModel.from_pretrained(sys.argv[1], quantization_config=hfc.HfCompressConfig("unstructured:0.5"))
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_second_copy_of_the_model_is_held(checkpoints, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = t.BertModel(t.BertConfig(**sizes, intermediate_size=4096))
    model.save_pretrained(tmp_path)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(checkpoints / "bert")]
    peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert size < peak < 1.6 * size
