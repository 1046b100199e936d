"""Image classification: every source of data, every kind of model, and what is said when something is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
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
