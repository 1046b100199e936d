"""Checkpoints on disk: which tensors there are, and one of them at a time. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

_WEIGHTS, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it.

    Attributes:
        file: a safetensors file.
        dtype: in the words of the format, such as "F32", "BF16", "I8".
        shape: of the tensor.
        start: of its bytes in the file.
        bytes: how many there are.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read, and nothing else.

    Attributes:
        source: what the user asked for: a folder, a file or a Hub id.
        revision: of a Hub id.
        config: content of config.json, empty where there is none that can be read.
        tensors: by their names on disk.
    """

    source: str
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped into memory for as long as it is in use."""
        file = self.tensors[name].file
        try:
            with safe_open(file, "pt") as content:
                return content.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {name!r} of {file}: {one_line(error)}") from error

    def read_bytes(self, name: str, start: int, size: int) -> bytes:
        """A part of the bytes of one tensor, whatever its type."""
        stored = self.tensors[name]
        with stored.file.open("rb") as file:
            file.seek(stored.start + start)
            return file.read(min(size, stored.bytes - start))


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Find the files of a checkpoint and read their headers.

    Args:
        model: a folder (one safetensors file, or shards with their index), a safetensors file, or a Hub id.
        revision: of a Hub id.

    Raises:
        ValueError: if there is no such checkpoint, it is pickled, a file is missing, truncated or no safetensors
            file, its weights are packed integers, or a revision of something local is asked for.
    """
    path = Path(model)
    if revision is not None and path.exists():
        raise ValueError(f"{model} is on this disk, where it has no revisions: --revision is of a Hub id; drop it")
    if path.is_file():
        files, index, config = [_unpickled(path)], None, None
    elif path.is_dir():
        files, index, config = _in_folder(path)
    elif path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise ValueError(f"there is no folder {model}; give a folder, a safetensors file or a Hub id such as me/model")
    else:
        files, index, config = _on_hub(model, revision)
    tensors = _by_index(index) if index else {}
    for file in files:
        tensors |= read_header(file)
    if not tensors:
        raise ValueError(f"{model} holds no tensor")
    checkpoint = Checkpoint(model, revision, _read_json(config) if config else {}, tensors)
    _refuse_packed(checkpoint)
    return checkpoint


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds. The format's own library judges the header before it is believed.

    Raises:
        ValueError: if the file is missing, truncated or of another format.
    """
    try:
        with safe_open(file, "pt"):
            pass
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {one_line(error)}; it is truncated or no safetensors file") from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            file, about["dtype"], tuple(about["shape"]), 8 + length + begin, about["data_offsets"][1] - begin
        )
        for name, about in header.items()
        for begin in about["data_offsets"][:1]
    }


def one_line(error: BaseException) -> str:
    """The message of a foreign error without its line breaks."""
    return " ".join(str(error).split())


Files = tuple[list[Path], dict[str, Path] | None, Path | None]  # whole files, tensors by an index, config


def _in_folder(folder: Path) -> Files:
    config = folder / _CONFIG if (folder / _CONFIG).is_file() else None
    if (folder / _WEIGHTS).is_file():  # which transformers loads, whatever an older index says
        return [folder / _WEIGHTS], None, config
    if (folder / _INDEX).is_file():
        return [], _files_of_index(folder / _INDEX, lambda name: folder / name), config
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, None, config
    if found:
        names = ", ".join(path.name for path in found[:4])
        raise ValueError(f"{folder} holds several safetensors files and no {_INDEX}: {names}; give one of them")
    for path in sorted(folder.iterdir()):
        _unpickled(path)
    raise ValueError(f"{folder} holds no safetensors file")


def _on_hub(name: str, revision: str | None) -> Files:
    from transformers.utils import cached_file

    def find(file: str, is_needed: bool = False) -> Path | None:
        options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": is_needed}
        try:
            found = cached_file(name, file, revision=revision, **options)
        except (OSError, ValueError) as error:
            note = f"{file} of {name} (pickled weights are not read)" if is_needed else name
            where = "there is no such folder here, and as a Hub id: "
            raise ValueError(f"cannot find {note}: {where}{one_line(error)}") from error
        return Path(found) if found else None

    def need(file: str) -> Path:
        return Path(str(find(file, is_needed=True)))

    config, whole = find(_CONFIG), find(_WEIGHTS)
    index = None if whole else find(_INDEX)
    if index:
        return [], _files_of_index(index, need), config
    return [whole or need(_WEIGHTS)], None, config


def _files_of_index(index: Path, find: Callable[[str], Path]) -> dict[str, Path]:
    """Names of tensors to their shards, which lie beside the index."""
    weight_map = _read_json(index).get("weight_map")
    texts = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    if not isinstance(weight_map, dict) or not texts:
        raise ValueError(f"{index} has no weight_map of tensors to files")
    for file in set(weight_map.values()):
        if PurePosixPath(file).name != file or not file.endswith(".safetensors") or "\\" in file:
            raise ValueError(f"{index} names {file!r}, which is no safetensors file beside it")
    files = {file: find(file) for file in sorted(set(weight_map.values()))}
    return {name: files[file] for name, file in weight_map.items()}


def _by_index(index: dict[str, Path]) -> dict[str, StoredTensor]:
    headers: dict[Path, dict[str, StoredTensor]] = {}
    for file in sorted(set(index.values())):
        if not file.is_file():
            raise ValueError(f"{file} is missing: the checkpoint is incomplete; download or save it again")
        headers[file] = read_header(file)
    for name, file in index.items():
        if name not in headers[file]:
            raise ValueError(f"{file} lacks {name!r}, which the index promises; download or save it again")
    return {name: headers[file][name] for name, file in index.items()}


def _unpickled(path: Path) -> Path:
    if path.suffix in _PICKLED:
        raise ValueError(
            f"{path} is pickled, and reading a pickle runs what is in it; save the model as safetensors "
            "(model.save_pretrained writes them) and report that"
        )
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _refuse_packed(checkpoint: Checkpoint) -> None:
    """Codes of compressed-tensors' int-quantized stand under the names of their weights; other formats pack them."""
    quantization = checkpoint.config.get("quantization_config")
    if not isinstance(quantization, dict):
        return
    method, form = quantization.get("quant_method"), quantization.get("format")
    if (method, form) != ("compressed-tensors", "int-quantized"):
        what = "whose smaller layers, factors or codes" if method == "hf_compress" else "whose packed codes"
        raise ValueError(
            f"{checkpoint.source} is stored by {method}{f' ({form})' if form else ''}, {what} have no "
            "magnitudes to compare; report the checkpoint that it was made from (`dense` of its family)"
        )
