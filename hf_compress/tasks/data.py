"""Where the samples of a task come from: the Hub, a folder, or files; and the share that is held out of them."""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk
from transformers.utils import logging

logger = logging.get_logger(__name__)

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_splits(
    name: str | None,
    config_name: str | None = None,
    train_file: str | None = None,
    eval_file: str | None = None,
    read: Callable[[str], Dataset] | None = None,
) -> DatasetDict:
    """All splits of a data set.

    Args:
        name: a data set of the Hub, a local folder, or one file, whose samples are the split "train".
        config_name: of a data set with several configurations.
        train_file: samples to train on; with it `name` is not looked at, so that it overrides a recipe's.
        eval_file: samples to evaluate on, the split "validation".
        read: from a path to the samples of a file, `read_file` by default.

    Raises:
        ValueError: for neither name nor train_file, or a file that is missing or of an unknown kind.
    """
    read = read or read_file
    if name is None and train_file is None:
        raise ValueError("give dataset_name (a data set of the Hub, a folder or a file), or train_file")
    if train_file is not None or (name is not None and Path(name).is_file()):
        splits = DatasetDict({"train": read(str(train_file or name))})
    elif (Path(str(name)) / "dataset_dict.json").is_file():
        splits = load_from_disk(str(name))
    else:
        splits = load_dataset(str(name), config_name)
    if eval_file is not None:
        splits["validation"] = read(eval_file)
    return splits


def read_file(path: str) -> Dataset:
    """The samples of one file of JSON, JSON lines, CSV, TSV, parquet or plain text.

    Raises:
        ValueError: if it is missing, of an unknown kind, or cannot be read.
    """
    kind = Path(path).suffix.lower()
    if kind not in _BUILDERS:
        raise ValueError(f"{path} is of an unknown kind; allowed: {', '.join(_BUILDERS)}")
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    options = {"sep": "\t"} if kind == ".tsv" else {}
    try:
        # It takes globs, and would read data1.csv for data[1].csv.
        return load_dataset(_BUILDERS[kind], data_files=glob.escape(path), split="train", **options)
    except Exception as error:  # the readers of datasets raise errors of many kinds
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error


def used_splits(splits: DatasetDict, source: str, eval_split: str | None) -> list[str]:
    """The name of the split to train on, and of the one to evaluate on where there is one.

    Raises:
        ValueError: naming the splits that there are.
    """
    evaluated = eval_split or next((s for s in ("validation", "test") if s in splits), None)
    used = ["train", *([evaluated] if evaluated else [])]
    for split in used:
        if split not in splits:
            raise ValueError(f"{source} has no split {split!r}; there are: {', '.join(splits)}")
    return used


def check_columns(splits: DatasetDict, used: list[str], source: str, **columns: str) -> None:
    """ValueError for a column, given under the name of its option, that a split in use lacks."""
    for option, column in columns.items():
        for split in used:
            there = splits[split].features
            if column not in there:
                where = source if split == "train" else f"split {split!r} of {source}"
                raise ValueError(f"{option}: no column {column!r} in {where}; there are: {', '.join(there)}")


def with_classes(splits: DatasetDict, used: list[str], column: str, source: str) -> list[Dataset]:
    """The splits in use with classes as labels: those of the data set, or its integers or strings, sorted.

    Raises:
        ValueError: if labels are no classes, missing (-1 or None) or others than those of the split "train".
    """
    classes = _classes(splits, used, column, source)
    return [_encode(splits[split], split, column, classes, source) for split in used]


def _classes(splits: DatasetDict, used: list[str], column: str, source: str) -> ClassLabel | list[Any]:
    """The classes of a column of labels, or the integers or strings in all splits that become classes, sorted."""
    label = splits["train"].features[column]
    for split in used:
        if splits[split].features[column] != label:
            raise ValueError(
                f"splits 'train' and {split!r} of {source} have different labels in column {column!r}: {label} and "
                f"{splits[split].features[column]}; give both the same classes, or choose another eval_split"
            )
    if isinstance(label, ClassLabel):
        return label
    if not isinstance(label, Value) or not any(kind in label.dtype for kind in ("int", "string", "bool")):
        raise ValueError(f"column {column!r} of {source} holds {label}, no classes; name another with label_column")
    alike = [split for split in splits.values() if split.features.get(column) == label]
    return sorted({value for split in alike for value in split.unique(column) if not _is_unlabelled(value)})


def _encode(dataset: Dataset, split: str, column: str, classes: ClassLabel | list[Any], source: str) -> Dataset:
    """A split whose labels are classes."""
    found = dataset.unique(column)
    strange = [v for v in found if _is_unlabelled(v) or (isinstance(classes, ClassLabel) and v >= len(classes.names))]
    if strange:
        raise ValueError(
            f"split {split!r} of {source} has labels in column {column!r} that are no class: {strange[:5]} (-1 and "
            "None mean unlabelled); remove these samples, or choose another eval_split or label_column"
        )
    if isinstance(classes, ClassLabel):
        return dataset
    index = {value: i for i, value in enumerate(classes)}
    encoded = [index[value] for value in dataset.select_columns(column)[:][column]]
    feature = ClassLabel(names=[str(value) for value in classes])
    return dataset.remove_columns(column).add_column(column, encoded, feature=feature)


def _is_unlabelled(value: Any) -> bool:
    return value is None or (not isinstance(value, str) and value < 0)


def hold_out(dataset: Dataset, share: float, seed: int, label_column: str | None) -> tuple[Dataset, Dataset]:
    """Training data in two parts, by class where every class has enough samples."""
    try:
        parts = dataset.train_test_split(test_size=share, seed=seed, stratify_by_column=label_column)
    except ValueError as error:
        logger.warning(f"the held-out share is drawn without regard to classes: {error}")
        parts = dataset.train_test_split(test_size=share, seed=seed)
    return parts["train"], parts["test"]


def some(dataset: Dataset, count: int | None, seed: int) -> Dataset:
    """So many samples at random: the first ones of a folder are of one class."""
    return dataset if count is None or count >= len(dataset) else dataset.shuffle(seed=seed).select(range(count))


def check_counts(**counts: int | None) -> None:
    """ValueError for a number of samples below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}; leave it out to use all")
