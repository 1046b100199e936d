"""Image classification: every source of data, every kind of model, and what is said when something is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL.Image import fromarray

from hf_compress.tasks.image_classification import ImageClassificationArguments, digits, prepare
from hf_compress.tasks.metrics import accuracy
from tests.conftest import ROOT, tiny_vit

TINY_VIT = (
    '{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "patch_size": 4}'
)


def tiny(**overrides):
    return ImageClassificationArguments(**{"architecture": "vit", "model_args": TINY_VIT, "image_size": 8, **overrides})


def pictures(count, size=10):
    generator = np.random.default_rng(0)
    return [fromarray(generator.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture
def image_folder(tmp_path):
    for split, count in (("train", 8), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i, image in enumerate(pictures(count)):
                image.save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    data, source = digits(), load_digits()
    assert len(data) == 1797
    assert data["label"][:50] == source.target[:50].tolist()
    image = np.asarray(data[7]["image"])
    assert image.shape == (8, 8)
    assert np.abs(image - source.images[7] * 255 / 16).max() < 1
    assert image.max() == 255


def test_the_held_out_share_is_stratified_disjoint_and_seeded():
    first, again, other = (prepare(tiny(data_seed_split=seed)) for seed in (0, 0, 1))
    assert (len(first["train_dataset"]), len(first["eval_dataset"])) == (1257, 540)
    labels = first["eval_dataset"].with_format(None)["label"]
    shares = np.bincount(labels) / np.bincount(digits()["label"])
    assert abs(shares - 0.3).max() < 0.01
    assert labels == again["eval_dataset"].with_format(None)["label"]
    assert labels != other["eval_dataset"].with_format(None)["label"]


def test_samples_are_what_the_processor_makes_of_the_image():
    parts = prepare(tiny())
    sample = parts["train_dataset"][3]
    image = parts["train_dataset"].with_format(None)[3]["image"]
    expected = parts["processing_class"](image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(sample["pixel_values"], expected)
    batch = parts["data_collator"]([parts["train_dataset"][i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["labels"].dtype == torch.int64
    assert parts["model"](**batch).loss.isfinite()
    assert parts["model"].config.id2label[7] == "7"


def test_a_folder_of_images(image_folder):
    parts = prepare(tiny(dataset_name=str(image_folder)))
    assert (len(parts["train_dataset"]), len(parts["eval_dataset"])) == (16, 8)
    assert parts["model"].config.id2label == {0: "cat", 1: "dog"}


def test_parquet_files(tmp_path):
    features = Features({"picture": Image(), "labels": ClassLabel(names=["a", "b"])})
    data = Dataset.from_dict({"picture": pictures(12), "labels": [0, 1] * 6}, features=features)
    data.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    data.select(range(4)).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    parts = prepare(tiny(dataset_name=str(tmp_path), max_train_samples=5))
    assert (len(parts["train_dataset"]), len(parts["eval_dataset"])) == (5, 4)


@pytest.mark.skipif(not (ROOT.parent / "shared/data/cifar10").is_dir(), reason="the shared CIFAR-10 is not here")
def test_shared_cifar10():
    folder = str(ROOT.parent / "shared" / "data" / "cifar10")
    parts = prepare(
        ImageClassificationArguments(dataset_name=folder, architecture="resnet20_cifar", augmentation="crop_flip")
    )
    assert (len(parts["train_dataset"]), len(parts["eval_dataset"])) == (50_000, 10_000)
    batch = parts["data_collator"](parts["train_dataset"].__getitems__([0, 1, 2]))
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert list(parts["model"].config.id2label.values()) == names


def labelled(labels, feature, **columns):
    """A data set of small pictures with these labels."""
    features = Features({"image": Image(), "label": feature, **{name: Value("string") for name in columns}})
    return Dataset.from_dict({"image": pictures(len(labels)), "label": labels, **columns}, features=features)


def saved(tmp_path, **splits):
    DatasetDict(splits).save_to_disk(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "train", "test", "unused", "names"),
    [
        ("int64", [10, 2, 10, 2], [2, 7, 7], [5], ["2", "5", "7", "10"]),
        ("uint8", [1, 0, 1, 0], [1, 1, 0], [0], ["0", "1"]),
        ("string", ["dog", "cat", "dog", "cat"], ["bird", "dog", "cat"], ["ant"], ["ant", "bird", "cat", "dog"]),
        ("bool", [True, False, True, False], [True, False, True], [True], ["False", "True"]),
    ],
)
def test_integers_and_strings_become_classes_with_one_encoding(tmp_path, dtype, train, test, unused, names):
    splits = {"train": train, "test": test, "other": unused}
    name = saved(tmp_path, **{k: labelled(v, Value(dtype)) for k, v in splits.items()})
    parts = prepare(tiny(dataset_name=name))
    assert list(parts["model"].config.id2label.values()) == names
    for split, key in ((train, "train_dataset"), (test, "eval_dataset")):
        stored = parts[key].with_format(None)
        assert [names[i] for i in stored["label"]] == [str(v) for v in split]
        assert stored[0]["image"].size == (10, 10)
        assert [names[parts[key][i]["labels"]] for i in range(3)] == [str(v) for v in split[:3]]


def test_unlabelled_samples_are_refused_and_their_split_named(tmp_path):
    classes = ClassLabel(names=["a", "b"])
    good = labelled([0, 1] * 6, classes)
    for labels in ([0, -1], [0, None], [0, 1]):
        for kind in (classes, Value("int32")):
            parts = {"train": good.cast_column("label", kind), "test": labelled(labels, kind)}
            name = saved(tmp_path / f"{labels[1]}-{type(kind).__name__}", **parts)
            if labels[1] == 1:
                prepare(tiny(dataset_name=name))
                continue
            message = rf"split 'test' of .* that are no class: \[{labels[1]}\].*choose another eval_split"
            with pytest.raises(ValueError, match=message):
                prepare(tiny(dataset_name=name))
            prepare(tiny(dataset_name=name, eval_split="train"))  # a split that is not used may be unlabelled
    name = saved(tmp_path / "train", train=labelled([0, 1, -1] * 4, classes))
    with pytest.raises(ValueError, match=r"split 'train' of .* that are no class: \[-1\]"):
        prepare(tiny(dataset_name=name))


def test_splits_with_other_classes_or_without_a_column_are_refused(tmp_path):
    train, test = labelled([0, 1] * 4, ClassLabel(names=["a", "b"])), labelled([0, 1], ClassLabel(names=["b", "a"]))
    with pytest.raises(ValueError, match="splits 'train' and 'test' of .* have different labels in column 'label'"):
        prepare(tiny(dataset_name=saved(tmp_path / "1", train=train, test=test)))
    with pytest.raises(ValueError, match="label_column: no column 'label' in split 'test' of"):
        prepare(tiny(dataset_name=saved(tmp_path / "2", train=train, test=test.remove_columns("label"))))


def test_an_image_column_without_images_is_refused(tmp_path):
    data = labelled([0, 1] * 4, ClassLabel(names=["a", "b"]), path=["x.png"] * 8)
    name = saved(tmp_path, train=data)
    message = "image_column: column 'path' of .* holds .*, no images; columns of images: image"
    with pytest.raises(ValueError, match=message):
        prepare(tiny(dataset_name=name, image_column="path"))


def test_a_class_with_one_sample_is_split_without_regard_to_classes(tmp_path, caplog):
    name = saved(tmp_path, train=labelled([0] * 5 + [1] * 6 + [2], ClassLabel(names=["a", "b", "c"])))
    parts = prepare(tiny(dataset_name=name))
    assert (len(parts["train_dataset"]), len(parts["eval_dataset"])) == (8, 4)
    assert "the held-out share is drawn without regard to classes" in caplog.text


def test_samples_for_a_trial_are_drawn_from_all_classes(image_folder):
    def chosen(**overrides):
        parts = prepare(tiny(dataset_name=str(image_folder), max_train_samples=8, max_eval_samples=4, **overrides))
        return [parts[key].with_format(None)["label"][:] for key in ("train_dataset", "eval_dataset")]

    train, evaluation = chosen()
    assert (len(train), len(evaluation)) == (8, 4)
    assert set(train) == set(evaluation) == {0, 1}
    assert chosen() == [train, evaluation]
    assert chosen(data_seed_split=1) != [train, evaluation]


def test_augmentation_changes_training_images_only():
    parts = prepare(tiny(augmentation="crop_flip"))
    torch.manual_seed(0)
    draws = {parts["train_dataset"][0]["pixel_values"].sum().item() for _ in range(8)}
    assert len(draws) > 1
    assert torch.equal(parts["eval_dataset"][0]["pixel_values"], parts["eval_dataset"][0]["pixel_values"])
    resized = prepare(tiny(augmentation="resized_crop_flip"))
    assert resized["train_dataset"][0]["pixel_values"].shape == (3, 8, 8)


def test_a_pretrained_model_gets_a_new_head(tmp_path):
    from transformers import ViTImageProcessor

    model = tiny_vit(num_labels=3)
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    loaded = prepare(ImageClassificationArguments(model_name_or_path=str(tmp_path)))["model"]
    assert loaded.classifier.out_features == 10
    key = "vit.layers.0.mlp.fc1.weight"
    assert torch.equal(loaded.get_parameter(key), model.get_parameter(key))


def check_timm_checkpoint(parts, folder, image):
    """Saved, it gives the same logits in transformers and in timm itself, and its processor the same pixels."""
    import timm
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = parts["model"].eval()
    pixels = parts["eval_dataset"][0]["pixel_values"][None]
    assert pixels.shape[1:] == image
    model.save_pretrained(folder)
    names = parts["eval_dataset"].features["label"].names
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    native = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        wanted = model(pixels).logits
        assert wanted.shape == (1, len(names))
        for found in (loaded(pixels).logits, native(pixels)):  # kernels sum by the alignment of weights in memory
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    weights = model.timm_model.state_dict()
    for found in (loaded.timm_model.state_dict(), native.state_dict()):
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert list(loaded.config.id2label.values()) == list(native.pretrained_cfg["label_names"]) == names
    assert native.num_classes == len(names)
    assert tuple(native.pretrained_cfg["input_size"]) == image
    source = parts["eval_dataset"].with_format(None)[0]["image"].convert({1: "L", 3: "RGB"}[image[0]])
    assert torch.equal(AutoImageProcessor.from_pretrained(folder)(source)["pixel_values"], pixels)
    assert len(native.pretrained_cfg["mean"]) == len(native.pretrained_cfg["std"]) == image[0]


SMALL_TIMM_VIT = {"depth": 1, "embed_dim": 12, "num_heads": 2}


@pytest.mark.parametrize("saved_by", ["timm", "transformers"])
@pytest.mark.parametrize(
    ("architecture", "arguments", "image"),
    [
        ("resnet20_cifar", {"width": 4}, (3, 32, 32)),
        ("resnet20_cifar", {"width": 4, "in_chans": 1}, (1, 32, 32)),
        ("vit_tiny_patch16_224", {**SMALL_TIMM_VIT, "img_size": 32}, (3, 32, 32)),
    ],
)
def test_a_pretrained_timm_model_gets_a_new_head(tmp_path, saved_by, architecture, arguments, image):
    import timm
    from timm.models import save_for_hf
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    if saved_by == "timm":
        source = timm.create_model(architecture, num_classes=3, **arguments)
        old = {"label_names": list("abc"), "label_descriptions": dict.fromkeys("abc", "old")}
        save_for_hf(source, tmp_path / "old", safe_serialization=True, model_config=old)
    else:
        config = TimmWrapperConfig(architecture=architecture, model_args=arguments, num_labels=3)
        wrapper = TimmWrapperForImageClassification(config)
        wrapper.save_pretrained(tmp_path / "old")
        source = wrapper.timm_model
    parts = prepare(ImageClassificationArguments(model_name_or_path=str(tmp_path / "old")))
    assert parts["model"].config.num_labels == 10
    kept = dict(parts["model"].timm_model.named_parameters())
    head = tuple(f"{source.pretrained_cfg['classifier']}.{name}" for name in ("weight", "bias"))
    assert all(torch.equal(kept[n], p) == (n not in head) for n, p in source.named_parameters())
    check_timm_checkpoint(parts, tmp_path / "new", image)


@pytest.mark.parametrize(
    ("architecture", "arguments", "size", "image"),
    [
        ("vit_tiny_patch16_224", SMALL_TIMM_VIT, 32, (3, 32, 32)),
        ("vit_tiny_patch16_224", {**SMALL_TIMM_VIT, "in_chans": 1, "img_size": 48}, None, (1, 48, 48)),
        ("resnet20_cifar", {"width": 4, "in_chans": 1}, 16, (1, 16, 16)),
    ],
)
def test_a_new_timm_model_takes_the_size_and_the_channels(tmp_path, architecture, arguments, size, image):
    parts = prepare(tiny(architecture=architecture, model_args=arguments, image_size=size))
    check_timm_checkpoint(parts, tmp_path, image)


def test_a_model_of_one_channel_sees_grey_images(tmp_path):
    from transformers import ViTImageProcessor

    parts = prepare(tiny(model_args={**json.loads(TINY_VIT), "num_channels": 1}))
    assert list(parts["processing_class"].image_mean) == [0.5]
    batch = parts["data_collator"]([parts["train_dataset"][i] for i in range(2)])
    assert batch["pixel_values"].shape == (2, 1, 8, 8)
    assert parts["model"](**batch).loss.isfinite()
    parts["model"].save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)  # of three channels
    loaded = prepare(ImageClassificationArguments(model_name_or_path=str(tmp_path)))
    assert loaded["train_dataset"][0]["pixel_values"].shape == (1, 8, 8)
    with pytest.raises(ValueError, match=r"images of 4 channels; allowed: 1 \(grey\) and 3 \(RGB\)"):
        prepare(tiny(model_args={**json.loads(TINY_VIT), "num_channels": 4}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architecture": None}, "give either model_name_or_path"),
        ({"model_name_or_path": "x"}, "give either model_name_or_path"),
        ({"augmentation": "mixup"}, "augmentation must be one of none, crop_flip"),
        ({"validation_share": 1.0}, "validation_share must be between 0 and 1"),
        ({"architecture": "resnet_99"}, "neither a model of timm .* nor a model type of transformers"),
        ({"model_args": "{hidden}"}, "model_args must be JSON"),
        ({"model_args": "[1]"}, "model_args must be a JSON object"),
        ({"model_args": '{"hidden_sise": 8}'}, "vit has no field hidden_sise"),
        ({"model_args": 5}, "model_args must be JSON such as .*, got 5"),
        ({"model_args": {"hidden_size": "wide"}}, "model_args: vit cannot be built with .*hidden_size"),
        ({"model_args": {"id2label": {}}}, "model_args: id2label cannot be set"),
        ({"architecture": "resnet20_cifar", "model_args": '{"foo": 1}'}, "model_args: timm cannot build .*'foo'"),
        ({"architecture": "resnet20_cifar", "model_args": '{"num_classes": 3}'}, "model_args: num_classes cannot be"),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": '{"img_size": 48}', "image_size": 32},
            "image_size is 32 and img_size in model_args 48; give one",
        ),
        ({"max_eval_samples": 0}, "max_eval_samples must be at least 1, got 0"),
        ({"label_column": "class"}, "label_column: no column 'class' in digits; there are: image, label"),
        ({"image_column": "img"}, "image_column: no column 'img'"),
        ({"eval_split": "dev"}, "no split 'dev'; there are: train"),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(ValueError, match=message):
        prepare(tiny(**overrides))


def test_labels_that_are_no_classes(tmp_path):
    features = Features({"image": Image(), "label": Value("float32")})
    Dataset.from_dict({"image": pictures(4), "label": [0.5] * 4}, features=features).to_parquet(
        tmp_path / "train.parquet"
    )
    with pytest.raises(ValueError, match="holds .*, no classes; name another with label_column"):
        prepare(tiny(dataset_name=str(tmp_path), eval_split="train"))


def test_accuracy():
    assert accuracy([1, 2, 3, 4], [1, 2, 0, 0]) == 0.5
    with pytest.raises(ValueError, match="must have one shape"):
        accuracy([1, 2], [1])
    with pytest.raises(ValueError, match="not empty"):
        accuracy([], [])


@pytest.mark.parametrize("model", ["timm", "transformers"])
def test_a_resized_crop_is_shown_whole(monkeypatch, model):
    """The evaluation transform of timm's nets enlarges and cuts again, which would take the frame of every crop."""
    from torchvision.transforms import v2

    monkeypatch.setattr(v2, "RandomResizedCrop", lambda side: v2.Resize((side, side)))
    monkeypatch.setattr(v2, "RandomHorizontalFlip", lambda: v2.Identity())
    own = {"architecture": "resnet50.tv_in1k", "model_args": None, "image_size": None}
    parts = prepare(tiny(augmentation="resized_crop_flip", **(own if model == "timm" else {"image_size": 64})))
    side = 224 if model == "timm" else 64
    image = parts["train_dataset"].with_format(None)[0]["image"].convert("RGB").resize((side, side), 2)
    shown = parts["train_dataset"][0]["pixel_values"]
    assert shown.shape == (3, side, side)
    # Up to the normalisation of each channel, every pixel is there, the frame too.
    for channel, pixels in zip(shown.numpy(), np.asarray(image, dtype="float32").transpose(2, 0, 1), strict=True):
        assert np.corrcoef(channel.ravel(), pixels.ravel())[0, 1] > 0.995
