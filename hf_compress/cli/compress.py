"""`hf-compress compress`: any checkpoint, one shot, no training."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..family import build_family
from ..family.build import save_checkpoint
from ..family.manifest import commit_folder, start_folder
from ..oneshot import compress as compress_model
from ..patterns import parse_pattern
from .table import VariantPrinter


def compress(argv: Sequence[str]) -> None:
    """Compress a checkpoint: one pattern gives a checkpoint, several give a family."""
    parser = argparse.ArgumentParser(
        prog="hf-compress compress",
        description="Compress any checkpoint of transformers or timm in one shot, without training.",
    )
    parser.add_argument("model", help="folder or Hub id of a transformers or timm checkpoint")
    parser.add_argument("--pattern", action="append", required=True, help="such as unstructured:0.8 or 2:4; repeatable")
    parser.add_argument("--output_dir", required=True, help="a new folder")
    parser.add_argument("--include", nargs="+", help="globs on names of weights to compress")
    parser.add_argument("--exclude", nargs="+", help="globs on names of weights to leave alone")
    parser.add_argument("--revision", help="of a Hub checkpoint")
    args = parser.parse_args(argv)
    patterns = [parse_pattern(p) for p in args.pattern]
    model, processing_class = load_checkpoint(args.model, args.revision)
    if len(patterns) > 1:
        printer = VariantPrinter()
        family = build_family(
            model,
            patterns,
            output_dir=args.output_dir,
            processing_class=processing_class,
            include=args.include,
            exclude=args.exclude,
            progress=printer,
        )
        printer.finish(family)
        return
    target = Path(args.output_dir).absolute()
    partial = start_folder(target)
    try:
        report = compress_model(model, patterns[0], args.include, args.exclude)
        save_checkpoint(model, processing_class, partial)
        commit_folder(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for name, reason in report.skipped.items():
        print(f"left dense: {name}, {reason}")
    share = f"{100 * report.sparsity:.1f} % zeros in {len(report.layers)} weights"
    print(f"saved {args.output_dir}: {report.pattern}, {share}")


def load_checkpoint(name: str, revision: str | None = None) -> tuple[Any, Any]:
    """The model of a checkpoint in the class that saved it, and its tokenizer or image processor if it has one.

    Raises:
        ValueError: if there is no such checkpoint, or it is truncated or of an unknown class.
    """
    import transformers
    from safetensors import SafetensorError

    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision)
        architecture = (config.architectures or [None])[0]
        if isinstance(config, transformers.TimmWrapperConfig):
            architecture = "TimmWrapperForImageClassification"
        model_class = getattr(transformers, architecture or "AutoModel", None)
        if model_class is None:
            raise ValueError(f"{name} was saved by {architecture}, which this transformers does not have")
        model, info = model_class.from_pretrained(name, revision=revision, dtype="auto", output_loading_info=True)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"cannot load {name}: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{name} is incomplete: it lacks {len(missing)} weights of {architecture}, first {missing[0]}")
    try:
        processing_class = transformers.AutoProcessor.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError):
        processing_class = None  # a checkpoint need not have one
    return model, processing_class
