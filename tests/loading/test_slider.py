"""Pruned while loading: the same bits as loading and compressing, for every way to load."""

from __future__ import annotations

import hashlib
import math
import shutil
from decimal import Decimal

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image
from safetensors.torch import load_file, save_file

import hf_compress as hfc
from tests.conftest import ROOT, tiny_vit
from tests.loading.conftest import MODELS, bits, compressed, equal_zeros, load, slide, zeros

SHARES = ["0", "0.3", "0.5", "0.8", "0.95"]
PATTERNS = [*(f"unstructured:{s}" for s in SHARES), "unstructured:0.5:layer", "2:4", "int8", "2:4+int8"]
MINILM = ROOT.parent / "shared" / "data" / "minilm_l6"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_that_of_compress(checkpoints, name, pattern):
    folder = checkpoints / name
    loaded = slide(folder, pattern)
    assert bits(loaded) == bits(compressed(folder, pattern))
    assert (bits(loaded) == bits(load(folder))) == (pattern == "unstructured:0")


@pytest.mark.parametrize("share", SHARES)
def test_the_zeros_are_those_of_a_stable_sort_of_what_is_stored(checkpoints, share):
    stored = load_file(checkpoints / "bert" / "model.safetensors")
    loaded = slide(checkpoints / "bert", f"unstructured:{share}")
    names = list(hfc.find_targets(loaded))
    magnitudes = np.concatenate([stored[n].abs().flatten().numpy() for n in names])
    pruned = np.zeros(magnitudes.size, bool)
    pruned[np.argsort(magnitudes, kind="stable")[: math.floor(Decimal(share) * magnitudes.size)]] = True
    assert np.array_equal(torch.cat([z.flatten() for z in zeros(loaded).values()]).numpy(), pruned)


@pytest.mark.skipif(not MINILM.is_dir(), reason="the shared MiniLM is not here")
@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p != "int8"])
def test_a_pretrained_encoder_that_is_stored_in_half_precision(pattern):
    loaded = t.AutoModel.from_pretrained(MINILM, dtype=torch.float32, quantization_config=hfc.HfCompressConfig(pattern))
    expected = t.AutoModel.from_pretrained(MINILM, dtype=torch.float16)
    hfc.compress(expected, pattern)
    for (name, a), (other, b) in zip(loaded.named_parameters(), expected.float().named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def save(weights, folder, destination):
    """A copy of a checkpoint with other weights."""
    shutil.copy(folder / "config.json", destination)
    save_file(weights, destination / "model.safetensors", metadata={"format": "pt"})


def blur(folder, destination):
    """A copy of a checkpoint whose weights differ in the last bits of float32 only."""
    generator = torch.Generator().manual_seed(3)
    model = load(folder)
    with torch.no_grad():
        for target in hfc.find_targets(model).values():
            noise = torch.randint(0, 500, target.parameter.shape, generator=generator) * 2.0**-23
            target.parameter.copy_(target.parameter.sign() * (1 + noise))
    model.save_pretrained(destination)
    return destination


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_selection_is_on_the_stored_weights_before_the_cast(checkpoints, tmp_path, name, dtype):
    folder = blur(checkpoints / name, tmp_path)
    plain = load(folder, dtype=dtype)
    for pattern in ("unstructured:0.5", "2:4"):
        loaded, expected = slide(folder, pattern, dtype=dtype), compressed(folder, pattern)
        assert equal_zeros(loaded, expected)
        values = zip(loaded.state_dict().values(), expected.state_dict().values(), strict=True)
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in values)
        assert [v.dtype for v in loaded.state_dict().values()] == [v.dtype for v in plain.state_dict().values()]
        after_the_cast = load(folder, dtype=dtype)
        hfc.compress(after_the_cast, pattern)
        assert not equal_zeros(after_the_cast, expected)


@pytest.mark.parametrize("pattern", ["int8", "2:4+int8"])
@pytest.mark.parametrize(
    ("stored", "asked"), [("float16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")]
)
def test_values_are_rounded_in_the_stored_type_and_cast_then(checkpoints, tmp_path, stored, asked, pattern):
    load(checkpoints / "vit").to(getattr(torch, stored)).save_pretrained(tmp_path)
    loaded = slide(tmp_path, pattern, dtype=asked)
    assert bits(loaded) == bits(compressed(tmp_path, pattern, dtype=stored).to(getattr(torch, asked)))
    assert bits(loaded) != bits(compressed(tmp_path, pattern, dtype=asked))


def test_weights_that_are_kept_in_float32_stay_so(checkpoints):
    loaded = slide(checkpoints / "t5", "unstructured:0.5", dtype=torch.float16)
    assert {n.split(".")[-2] for n, p in loaded.named_parameters() if p.dtype == torch.float32} == {"wo"}
    assert loaded.lm_head.weight is loaded.shared.weight


def test_a_checkpoint_of_mixed_types(checkpoints, tmp_path):
    stored = load_file(checkpoints / "bert" / "model.safetensors")
    for i, name in enumerate(stored):
        stored[name] = stored[name].to([torch.float16, torch.float32, torch.bfloat16][i % 3])
    save(stored, checkpoints / "bert", tmp_path)
    expected = load(tmp_path)
    for name, parameter in expected.named_parameters():
        parameter.data = stored[name]
    hfc.compress(expected, "2:4+int8")
    assert bits(slide(tmp_path, "2:4+int8")) == bits(expected.float())


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_checkpoint(checkpoints, tmp_path, name):
    load(checkpoints / name).save_pretrained(tmp_path, max_shard_size="2MB" if name == "timm" else "8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert bits(slide(tmp_path, "unstructured:0.8")) == bits(compressed(checkpoints / name, "unstructured:0.8"))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"vit": "cpu", "classifier": "cpu"}])
def test_device_map(checkpoints, device_map):
    plain = load(checkpoints / "vit", device_map=device_map, dtype=torch.bfloat16)
    loaded = slide(checkpoints / "vit", "unstructured:0.8", device_map=device_map, dtype=torch.bfloat16)
    assert bits(loaded) == bits(compressed(checkpoints / "vit", "unstructured:0.8").bfloat16())
    assert vars(loaded).get("hf_device_map") == vars(plain).get("hf_device_map")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("pattern", ["unstructured:0.8", "2:4+int8"])
def test_weights_on_two_devices_are_compared_with_each_other(checkpoints, pattern):
    device_map = {"bert.embeddings": 0, "bert.encoder": 0, "bert.pooler": 1, "classifier": 1}
    loaded = slide(checkpoints / "bert", pattern, device_map=device_map, dtype=torch.bfloat16)
    assert {str(p.device) for p in loaded.parameters()} == {"cuda:0", "cuda:1"}
    assert bits(loaded.cpu()) == bits(compressed(checkpoints / "bert", pattern).bfloat16())


def test_the_bare_model_of_a_task_checkpoint(checkpoints):
    config = hfc.HfCompressConfig("unstructured:0.8")
    loaded = t.AutoModel.from_pretrained(checkpoints / "bert", quantization_config=config)
    expected = t.AutoModel.from_pretrained(checkpoints / "bert")
    hfc.compress(expected, "unstructured:0.8")
    assert bits(loaded) == bits(expected)


def test_a_new_head_is_left_alone(checkpoints):
    loaded, info = t.AutoModelForQuestionAnswering.from_pretrained(
        checkpoints / "bert", quantization_config=hfc.HfCompressConfig("unstructured:0.8"), output_loading_info=True
    )
    assert info["missing_keys"] == {"qa_outputs.weight", "qa_outputs.bias"}
    assert torch.count_nonzero(loaded.qa_outputs.weight) == loaded.qa_outputs.weight.numel()
    names = hfc.find_targets(loaded)
    weights = torch.cat([loaded.get_parameter(n).flatten() for n in names])
    assert int((weights == 0).sum()) == weights.numel() * 8 // 10


def test_a_target_that_the_checkpoint_lacks_is_new_and_pruned_too(checkpoints, tmp_path):
    stored = load_file(checkpoints / "bert" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    del stored[name]
    save(stored, checkpoints / "bert", tmp_path)
    loaded, info = slide(tmp_path, "unstructured:0.8", output_loading_info=True, dtype=torch.float16)
    assert info["missing_keys"] == {name}
    pruned = torch.cat([z.flatten() for z in zeros(loaded).values()])
    assert int(pruned.sum()) == math.floor(Decimal("0.8") * pruned.numel())
    assert 0 < int(zeros(loaded)[name].sum()) < zeros(loaded)[name].numel()
    assert loaded.get_parameter(name).dtype == torch.float16


@pytest.mark.parametrize(
    "globs", [{"include": ["vit.*.attention.*"]}, {"include": "classifier"}, {"exclude": ["*.0.*", "*patch*"]}]
)
def test_globs(checkpoints, globs):
    loaded = slide(checkpoints / "vit", "unstructured:0.5", **globs)
    assert bits(loaded) == bits(compressed(checkpoints / "vit", "unstructured:0.5", **globs))
    assert bits(loaded) != bits(compressed(checkpoints / "vit", "unstructured:0.5"))


def test_a_dict_is_a_config_too(checkpoints):
    config = {"quant_method": "hf_compress", "pattern": "2:4", "exclude": ["*.0.*"]}
    loaded = load(checkpoints / "vit", quantization_config=config)
    assert bits(loaded) == bits(compressed(checkpoints / "vit", "2:4", exclude=["*.0.*"]))


def test_a_pipeline(checkpoints, tmp_path):
    def scores(folder, **options):
        processor = t.ViTImageProcessor(size={"height": 8, "width": 8})
        pipe = t.pipeline("image-classification", str(folder), image_processor=processor, **options)
        return pipe(Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)))

    compressed(checkpoints / "vit", "unstructured:0.8").save_pretrained(tmp_path)
    config = hfc.HfCompressConfig("unstructured:0.8")
    found = scores(checkpoints / "vit", model_kwargs={"quantization_config": config})
    assert found == scores(tmp_path)
    assert found != scores(checkpoints / "vit")


def test_a_state_dict_and_a_file_keep_their_values(checkpoints):
    def digest():
        return hashlib.sha256((checkpoints / "vit" / "model.safetensors").read_bytes()).hexdigest()

    before, model = digest(), tiny_vit()
    values = {n: v.clone() for n, v in model.state_dict().items()}
    config = hfc.HfCompressConfig("unstructured:0.8")
    state = model.state_dict()
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=state, quantization_config=config)
    assert all(torch.equal(state[n], values[n]) for n in values)
    hfc.compress(model, "unstructured:0.8")
    assert bits(loaded) == bits(model)
    assert bits(slide(checkpoints / "vit", "unstructured:0.8")) == bits(model)
    assert digest() == before


def test_a_pickled_checkpoint(checkpoints, tmp_path):
    shutil.copy(checkpoints / "bert" / "config.json", tmp_path)
    torch.save(load(checkpoints / "bert").state_dict(), tmp_path / "pytorch_model.bin")
    loaded = slide(tmp_path, "unstructured:0.8", dtype=torch.float16)
    assert bits(loaded) == bits(compressed(checkpoints / "bert", "unstructured:0.8").half())


def test_weights_that_stay_dense_are_told(checkpoints, caplog):
    slide(checkpoints / "bert", "2:4")
    assert "dense" not in caplog.text
    slide(checkpoints / "vit", "2:4")
    name = "vit.embeddings.patch_embeddings.projection.weight"
    assert f"2:4 left 1 of 13 weights dense, {name} for one: its reduction axis of 3 is no multiple of 4" in caplog.text
