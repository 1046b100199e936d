"""Image classification: any image data set, any timm or transformers model.

Data come from the embedded handwritten digits ("digits"), a local folder (one folder a class, or parquet files), or
the Hub. Models come pretrained (`model_name_or_path`) or new (`architecture`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk

from .metrics import accuracy

AUGMENTATIONS = ("none", "crop_flip", "resized_crop_flip")


@dataclass
class ImageClassificationArguments:
    """Data and model of an image classification run.

    Args:
        dataset_name: "digits", a local folder, or a data set of the Hub.
        dataset_config_name: of a Hub data set with several.
        image_column: of the data set; the first column of images by default.
        label_column: of the data set; "label" or "labels" by default.
        validation_share: share of the training data held out, by class, where there is no split to evaluate on.
        data_seed_split: seed of that split.
        eval_split: evaluated on; "validation" or "test" by default, whichever comes first.
        max_train_samples: first so many, for a trial run.
        max_eval_samples: first so many, for a trial run.
        augmentation: of training images: "none", "crop_flip" (pad 4, crop, flip) or "resized_crop_flip".
        model_name_or_path: a pretrained model, local or on the Hub.
        architecture: a new model instead: a name of timm ("resnet20_cifar") or a model type of transformers ("vit").
        model_args: arguments of the new model: of timm's factory, or fields of the transformers config; JSON.
        image_size: side of the square images that a new model sees; its default otherwise.
    """

    dataset_name: str = field(default="digits", metadata={"help": "digits, a local folder, or a Hub data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels."})
    validation_share: float = field(default=0.3, metadata={"help": "Share held out where there is no eval split."})
    data_seed_split: int = field(default=0, metadata={"help": "Seed of the held-out share."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many only."})
    augmentation: str = field(default="none", metadata={"help": " | ".join(AUGMENTATIONS)})
    model_name_or_path: str | None = field(default=None, metadata={"help": "A pretrained model."})
    architecture: str | None = field(default=None, metadata={"help": "A new model: timm name or transformers type."})
    model_args: str | None = field(default=None, metadata={"help": "Arguments of the new model, as JSON."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the images that a new model sees."})

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.architecture is None):
            raise ValueError(
                "give either model_name_or_path (a pretrained model) or architecture (a new one: a name of timm such "
                f"as resnet18, or a model type of transformers such as vit); got {self.model_name_or_path!r} and "
                f"{self.architecture!r}"
            )
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}; got {self.augmentation!r}")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share}")


def prepare(args: ImageClassificationArguments) -> dict[str, Any]:
    """Everything that a `Trainer` takes: model, train_dataset, eval_dataset, data_collator, compute_metrics,
    processing_class."""
    train, evaluation, image_column, label_column = _load_data(args)
    labels = train.features[label_column]
    if not isinstance(labels, ClassLabel):
        raise ValueError(
            f"column {label_column!r} of {args.dataset_name} holds {labels}, no classes; name another with label_column"
        )
    if args.model_name_or_path:
        model, processor = _pretrained(args.model_name_or_path, labels.names)
    else:
        model, processor = _new(str(args.architecture), _parse_json(args.model_args), args.image_size, labels.names)
    augment = _augmentation(args.augmentation, processor)

    def transform(batch: dict[str, Any], training: bool) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[image_column]]
        if training:
            images = [augment(image) for image in images]
        return {
            "pixel_values": processor(images, return_tensors="pt")["pixel_values"],
            "labels": torch.tensor(batch[label_column]),
        }

    return {
        "model": model,
        "train_dataset": train.with_transform(lambda batch: transform(batch, training=True)),
        "eval_dataset": evaluation.with_transform(lambda batch: transform(batch, training=False)),
        "data_collator": _collate,
        "compute_metrics": lambda p: {"accuracy": accuracy(p.predictions.argmax(-1), p.label_ids)},
        "processing_class": processor,
    }


def digits() -> Dataset:
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries (UCI, Alpaydin and Kaynak)."""
    import numpy as np
    from PIL.Image import fromarray
    from sklearn.datasets import load_digits

    data = load_digits()
    images = [fromarray(np.uint8(image * 15.9375)) for image in data.images]  # 0 .. 16 to 0 .. 255
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    return Dataset.from_dict({"image": images, "label": data.target}, features=features)


def _load_data(args: ImageClassificationArguments) -> tuple[Dataset, Dataset, str, str]:
    if args.dataset_name == "digits":
        splits = DatasetDict({"train": digits()})
    elif (Path(args.dataset_name) / "dataset_dict.json").is_file():
        splits = load_from_disk(args.dataset_name)
    else:
        splits = load_dataset(args.dataset_name, args.dataset_config_name)
    if "train" not in splits:
        raise ValueError(f"{args.dataset_name} has no split 'train'; there are: {', '.join(splits)}")
    columns = splits["train"].features
    image_column = args.image_column or next((n for n, f in columns.items() if isinstance(f, Image)), "image")
    label_column = args.label_column or next((n for n in ("label", "labels") if n in columns), "label")
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in columns:
            raise ValueError(f"{option}: no column {column!r} in {args.dataset_name}; there are: {', '.join(columns)}")
    evaluated = args.eval_split or next((s for s in ("validation", "test") if s in splits), None)
    if evaluated is None:
        parts = splits["train"].train_test_split(
            test_size=args.validation_share, seed=args.data_seed_split, stratify_by_column=label_column
        )
        train, evaluation = parts["train"], parts["test"]
    elif evaluated in splits:
        train, evaluation = splits["train"], splits[evaluated]
    else:
        raise ValueError(f"{args.dataset_name} has no split {evaluated!r}; there are: {', '.join(splits)}")
    return _first(train, args.max_train_samples), _first(evaluation, args.max_eval_samples), image_column, label_column


def _first(dataset: Dataset, count: int | None) -> Dataset:
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def _pretrained(name: str, classes: list[str]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    config = AutoConfig.from_pretrained(name, **_label_maps(classes))
    model = AutoModelForImageClassification.from_pretrained(name, config=config, ignore_mismatched_sizes=True)
    return model, AutoImageProcessor.from_pretrained(name)


def _new(architecture: str, arguments: dict[str, Any], image_size: int | None, classes: list[str]) -> tuple[Any, Any]:
    import timm
    from transformers import CONFIG_MAPPING, AutoModelForImageClassification, ViTImageProcessor

    if timm.is_model(architecture):
        return _new_timm(architecture, arguments, image_size, classes)
    if architecture not in CONFIG_MAPPING:
        raise ValueError(
            f"architecture {architecture!r} is neither a model of timm (timm.list_models()) nor a model type of "
            "transformers, such as vit, resnet, convnext"
        )
    config_class = CONFIG_MAPPING[architecture]
    unknown = set(arguments) - set(config_class().to_dict())
    if unknown:
        raise ValueError(f"model_args: {architecture} has no field {', '.join(sorted(unknown))}")
    config = config_class(**arguments, **_label_maps(classes))
    size = int(image_size or getattr(config, "image_size", None) or 224)
    if hasattr(config, "image_size"):
        config.image_size = size
    mean = [0.5] * getattr(config, "num_channels", 3)
    processor = ViTImageProcessor(size={"height": size, "width": size}, image_mean=mean, image_std=mean)
    return AutoModelForImageClassification.from_config(config), processor


def _new_timm(
    architecture: str, arguments: dict[str, Any], image_size: int | None, classes: list[str]
) -> tuple[Any, Any]:
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperImageProcessor
    from transformers.core_model_loading import PrefixChange

    data_config: dict[str, Any] = timm.get_pretrained_cfg(architecture).to_dict()  # type: ignore[union-attr]
    if image_size is not None:
        data_config |= {"input_size": (data_config["input_size"][0], image_size, image_size), "crop_pct": 1.0}
    about: dict[str, Any] = {"pretrained_cfg": data_config, **_label_maps(classes)}
    config = TimmWrapperConfig(architecture=architecture, model_args=arguments, **about)
    model: Any = TimmWrapperForImageClassification(config)
    # The wrapper draws every layer anew from a normal of 0.02; a net starts from the values that its authors chose.
    native = timm.create_model(architecture, num_classes=len(classes), **arguments)
    model.timm_model.load_state_dict(native.state_dict())
    # Saved under timm's own names, so that timm loads the checkpoint too.
    model._weight_conversions = [PrefixChange(prefix_to_add="timm_model")]
    return model, TimmWrapperImageProcessor(pretrained_cfg=data_config, architecture=architecture)


def _label_maps(classes: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def _parse_json(text: Any) -> dict[str, Any]:
    try:
        value = text if isinstance(text, dict) else json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"model_args must be JSON such as '{{\"depths\": [1, 1]}}', got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"model_args must be a JSON object, got {text!r}")
    return value


def _augmentation(name: str, processor: Any) -> Any:
    from torchvision.transforms import v2

    if name == "none":
        return lambda image: image
    if name == "crop_flip":
        return v2.Compose([lambda im: v2.RandomCrop(im.size[::-1], padding=4)(im), v2.RandomHorizontalFlip()])
    size = getattr(processor, "size", None) or {}
    side = size.get("height") or size.get("shortest_edge") or processor.data_config["input_size"][-1]
    return v2.Compose([v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()])


def _collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([s["pixel_values"] for s in samples]),
        "labels": torch.stack([s["labels"] for s in samples]),
    }
