"""Where the samples of a task come from: the Hub, a folder, or files; and the share that is held out of them."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers.utils import logging

logger = logging.get_logger(__name__)

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_splits(
    name: str | None, config_name: str | None = None, train_file: str | None = None, eval_file: str | None = None
) -> DatasetDict:
    """All splits of a data set.

    Args:
        name: a data set of the Hub, a local folder, or one file, whose samples are the split "train".
        config_name: of a data set with several configurations.
        train_file: instead of `name`: samples to train on.
        eval_file: samples to evaluate on, the split "validation".

    Raises:
        ValueError: for both or neither of name and train_file, or a file that is missing or of an unknown kind.
    """
    if (name is None) == (train_file is None):
        raise ValueError(
            "give either dataset_name (a data set of the Hub, a folder or a file) or train_file; got "
            f"{name!r} and {train_file!r}"
        )
    if train_file is not None or (name is not None and Path(name).is_file()):
        splits = DatasetDict({"train": read_file(str(train_file or name))})
    elif (Path(str(name)) / "dataset_dict.json").is_file():
        splits = load_from_disk(str(name))
    else:
        splits = load_dataset(str(name), config_name)
    if eval_file is not None:
        splits["validation"] = read_file(eval_file)
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
        return load_dataset(_BUILDERS[kind], data_files=path, split="train", **options)
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
