"""Image classification: any image data set, any timm or transformers model.

Data come from the embedded handwritten digits ("digits"), a local folder (one folder a class, or parquet files), or
the Hub. Models come pretrained (`model_name_or_path`) or new (`architecture`).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from transformers.utils import logging

from .data import check_columns, check_counts, hold_out, load_splits, some, used_splits, with_classes
from .metrics import accuracy
from .timm_input import (
    INPUT_KEYS,
    describe_timm,
    fit_input,
    one_per_channel,
    timm_processor,
    with_native_names,
)

logger = logging.get_logger(__name__)

# Images become pixels when a sample is read, so the Trainer must not drop their column before.
DEFAULT_FLAGS = {"remove_unused_columns": False}
AUGMENTATIONS = ("none", "crop_flip", "resized_crop_flip")
# What images are converted to, by the channels that a model takes.
_MODES = {1: "L", 3: "RGB"}


@dataclass
class ImageClassificationArguments:
    """Data and model of an image classification run.

    Args:
        dataset_name: "digits", a local folder, or a data set of the Hub.
        dataset_config_name: of a Hub data set with several.
        image_column: of the data set; the first column of images by default.
        label_column: of the data set; "label" or "labels" by default. Integers and strings become classes.
        validation_share: share of the training data held out, by class, where there is no split to evaluate on.
        data_seed_split: seed of that split, and of the choice of max_train_samples and max_eval_samples.
        eval_split: evaluated on; "validation" or "test" by default, whichever comes first.
        max_train_samples: so many, chosen at random, for a trial run.
        max_eval_samples: so many, chosen at random, for a trial run.
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
    data_seed_split: int = field(default=0, metadata={"help": "Seed of the held-out share and of max_*_samples."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many only, chosen at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many only, chosen at random."})
    augmentation: str = field(default="none", metadata={"help": " | ".join(AUGMENTATIONS)})
    model_name_or_path: str | None = field(default=None, metadata={"help": "A pretrained model."})
    architecture: str | None = field(default=None, metadata={"help": "A new model: timm name or transformers type."})
    model_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the new model, as JSON."}
    )
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
        check_counts(max_train_samples=self.max_train_samples, max_eval_samples=self.max_eval_samples)


def prepare(args: ImageClassificationArguments) -> dict[str, Any]:
    """What a `Trainer` takes: model, data sets, data_collator, compute_metrics, processing_class."""
    train, evaluation, image_column, label_column = _load_data(args)
    classes = train.features[label_column].names
    if args.model_name_or_path:
        model, processor = _pretrained(args.model_name_or_path, classes)
    else:
        model, processor = _new(str(args.architecture), _parse_json(args.model_args), args.image_size, classes)
    channels = _channels(model, processor)
    augment = _augmentation(args.augmentation, processor)
    cut_to_size = _without_resizing(model, processor) if args.augmentation == "resized_crop_flip" else processor

    def transform(batch: dict[str, Any], training: bool) -> dict[str, Any]:
        if image_column not in batch:
            raise ValueError(f"column {image_column!r} was dropped; set remove_unused_columns to False")
        images = [image.convert(_MODES[channels]) for image in batch[image_column]]
        if training:
            images = [augment(image) for image in images]
        return {
            "pixel_values": (cut_to_size if training else processor)(images, return_tensors="pt")["pixel_values"],
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
    """The samples to train and to evaluate on, and their columns of images and labels; labels are classes."""
    name, seed = args.dataset_name, args.data_seed_split
    splits = DatasetDict({"train": digits()}) if name == "digits" else load_splits(name, args.dataset_config_name)
    used = used_splits(splits, name, args.eval_split)
    image_column, label_column = _columns(args, splits, used)
    train, *others = with_classes(splits, used, label_column, name)
    if not others:
        train, *others = hold_out(train, args.validation_share, seed, label_column)
    train, evaluation = some(train, args.max_train_samples, seed), some(others[0], args.max_eval_samples, seed)
    return train, evaluation, image_column, label_column


def _columns(args: ImageClassificationArguments, splits: DatasetDict, used: list[str]) -> tuple[str, str]:
    """The columns of images and labels, which all splits in use have."""
    columns = splits["train"].features
    images = [n for n, f in columns.items() if isinstance(f, Image)]
    image_column = args.image_column or next(iter(images), "image")
    label_column = args.label_column or next((n for n in ("label", "labels") if n in columns), "label")
    check_columns(splits, used, args.dataset_name, image_column=image_column, label_column=label_column)
    if image_column not in images:
        raise ValueError(
            f"image_column: column {image_column!r} of {args.dataset_name} holds {columns[image_column]}, no images; "
            f"columns of images: {', '.join(images) or 'none'}"
        )
    return image_column, label_column


def _pretrained(name: str, classes: list[str]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, TimmWrapperConfig

    config = AutoConfig.from_pretrained(name)
    is_timm = isinstance(config, TimmWrapperConfig)
    if is_timm:
        describe_timm(config, classes)
    # On the object: the config of timm models takes no id2label when it is read from a file.
    for key, value in _label_maps(classes).items():
        setattr(config, key, value)
    options = {"config": config, "ignore_mismatched_sizes": True, "dtype": torch.float32}  # master weights
    model = AutoModelForImageClassification.from_pretrained(name, **options)
    if is_timm:
        return with_native_names(model), timm_processor(config)
    processor = AutoImageProcessor.from_pretrained(name)
    for key in ("image_mean", "image_std"):
        if isinstance(getattr(processor, key, None), (list, tuple)):
            setattr(processor, key, one_per_channel(getattr(processor, key), _channels(model, processor)))
    return model, processor


def _new(architecture: str, arguments: dict[str, Any], image_size: int | None, classes: list[str]) -> tuple[Any, Any]:
    import timm
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoModelForImageClassification, ViTImageProcessor

    reserved = {"num_classes", "num_labels", "id2label", "label2id", "pretrained", "pretrained_cfg"} & set(arguments)
    if reserved:
        raise ValueError(
            f"model_args: {', '.join(sorted(reserved))} cannot be set: the classes come from the data set, and "
            "pretrained weights from model_name_or_path; leave it out"
        )
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
    try:
        config = config_class(**arguments, **_label_maps(classes))
    except (TypeError, StrictDataclassError) as error:
        raise ValueError(f"model_args: {architecture} cannot be built with {arguments}: {error}") from error
    size = int(image_size or getattr(config, "image_size", None) or 224)
    if hasattr(config, "image_size"):
        config.image_size = size
    model = AutoModelForImageClassification.from_config(config)
    mean = [0.5] * _channels(model, None)
    return model, ViTImageProcessor(size={"height": size, "width": size}, image_mean=mean, image_std=mean)


def _new_timm(
    architecture: str, arguments: dict[str, Any], image_size: int | None, classes: list[str]
) -> tuple[Any, Any]:
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    registered: dict[str, Any] = timm.get_pretrained_cfg(architecture).to_dict()  # type: ignore[union-attr]
    about = {key: registered[key] for key in INPUT_KEYS if registered.get(key) is not None}
    if image_size is not None:
        if arguments.get("img_size", image_size) not in (image_size, [image_size, image_size]):
            raise ValueError(f"image_size is {image_size} and img_size in model_args {arguments['img_size']}; give one")
        about |= {"input_size": (about["input_size"][0], image_size, image_size), "crop_pct": 1.0}
        if about.get("fixed_input_size"):  # the shape of its weights depends on the size
            arguments = {**arguments, "img_size": image_size}
    try:
        native = timm.create_model(architecture, num_classes=len(classes), **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(f"model_args: timm cannot build {architecture} with {arguments}: {error}") from error
    fields: dict[str, Any] = {"pretrained_cfg": fit_input(about, arguments), **_label_maps(classes)}
    config = TimmWrapperConfig(architecture=architecture, model_args=arguments, **fields)
    model: Any = TimmWrapperForImageClassification(config)
    # The wrapper draws every layer anew from a normal of 0.02; a net starts from the values that its authors chose.
    model.timm_model.load_state_dict(native.state_dict())
    return with_native_names(model), timm_processor(config)


def _channels(model: Any, processor: Any) -> int:
    """Channels of the images that a model takes."""
    of_timm = getattr(processor, "data_config", None)
    config = getattr(model.config, "vision_config", model.config)
    channels = of_timm["input_size"][0] if of_timm else getattr(config, "num_channels", 3)
    if channels not in _MODES:
        raise ValueError(f"the model takes images of {channels} channels; allowed: 1 (grey) and 3 (RGB)")
    return channels


def _label_maps(classes: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def _parse_json(text: Any) -> dict[str, Any]:
    try:
        value = text if isinstance(text, dict) else json.loads("{}" if text is None else text)
    except (json.JSONDecodeError, TypeError) as error:
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


def _without_resizing(model: Any, processor: Any) -> Any:
    """For images that are cut to size already: an evaluation transform would cut their frame off once more."""
    if hasattr(processor, "data_config"):
        return timm_processor(model.config, crop_pct=1.0)
    return functools.partial(processor, do_resize=False, do_center_crop=False)


def _collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([s["pixel_values"] for s in samples]),
        "labels": torch.stack([s["labels"] for s in samples]),
    }
