"""`hf-compress compress`: any checkpoint, one shot, no training."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..calibration import batch_norm_statistics, fold_batch_norm_
from ..family import build_family
from ..family.build import save_checkpoint
from ..family.coded import round_rest_
from ..family.footprint import disk_bytes
from ..family.manifest import MANIFEST, check_target, commit_folder, start_folder
from ..family.storage import STORAGES, as_plain, changes_shapes, check_storage
from ..family.table import format_size
from ..loading.statistics import StatisticsPack, explained, find_pack, renew_
from ..loading.timm_classes import timm_class
from ..oneshot import CompressionReport
from ..oneshot import compress as compress_model
from ..patterns import LowRank, Pattern, parse_pattern
from ..patterns.groups import Grouped
from ..structure import describe
from .processors import load_processors, say_left_out
from .table import VariantPrinter


def compress(argv: Sequence[str]) -> None:
    """Compress a checkpoint: one pattern gives a checkpoint, several give a family."""
    args = _parser().parse_args(argv)
    patterns = [parse_pattern(p) for p in args.pattern]
    if not patterns and args.storage != "dense":
        raise ValueError("no --pattern: give one, such as --pattern unstructured:0.8, or --storage dense alone")
    check_storage(args.storage, patterns)
    _check_flags(args, patterns)
    target = Path(args.output_dir).absolute()
    if len(patterns) < 2:
        _check_empty(target)
    check_target(target)  # now rather than when the model is loaded
    model, processing_class = load_checkpoint(args.model, args.revision)
    model = as_plain(model)
    if len(patterns) > 1:
        printer = VariantPrinter()
        family = build_family(
            model,
            patterns,
            output_dir=args.output_dir,
            processing_class=processing_class,
            include=args.include,
            exclude=args.exclude,
            remove=args.remove,
            multiple_of=args.multiple_of,
            storage=args.storage,
            statistics=_statistics(model, args),
            before_save=lambda variant: _fold_and_round(variant, args),
            progress=printer,
        )
        say_left_out(args.model, args.revision, family.path_to(family.dense))
        printer.finish(family)
        return
    report = _write_one(model, processing_class, patterns[0] if patterns else None, target, args)
    say_left_out(args.model, args.revision, target)
    needs_us = "; it loads after `import hf_compress`" if args.storage == "coded" or describe(model) else ""
    if report is None:
        print(f"saved {args.output_dir}: plain tensors{needs_us}")
        return
    for name, reason in report.skipped.items():
        zeros = report.layers[name].sparsity if name in report.layers else 0.0
        print(f"{f'{100 * zeros:.0f} % zeros' if zeros else 'left dense'}: {name}, {reason}")
    share = f"{100 * report.sparsity:.1f} % zeros in {len(report.layers)} weights"
    if report.parameters_removed:
        rest = f", {share}" if report.sparsity else ""
        share = f"{report.parameters_removed} parameters removed{rest}"
    print(f"saved {args.output_dir}: {report.pattern}, {share}, {format_size(disk_bytes(target)[0])}{needs_us}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-compress compress",
        description="Compress any checkpoint of transformers or timm in one shot, without training.",
    )
    parser.add_argument("model", help="folder or Hub id of a transformers or timm checkpoint")
    parser.add_argument("--pattern", action="append", default=[], help="such as unstructured:0.8 or 2:4; repeatable")
    parser.add_argument("--output_dir", required=True, help="a new folder; several patterns may replace a family")
    parser.add_argument("--include", nargs="+", help="globs on names of weights to compress")
    parser.add_argument("--exclude", nargs="+", help="globs on names of weights to leave alone")
    parser.add_argument("--remove", action="store_true", help="cut filters, neurons and heads out, not only zero them")
    parser.add_argument("--multiple_of", type=int, default=1, help="with --remove: widths are rounded up to a multiple")
    parser.add_argument(
        "--storage",
        choices=STORAGES,
        help="coded: entropy-coded codes of intB patterns; dense: plain tensors, without --pattern of any checkpoint",
    )
    parser.add_argument("--fold_batch_norm", action="store_true", help="fold statistics into scales and shifts")
    parser.add_argument("--half_rest", action="store_true", help="round norms, biases, embeddings, heads to 16 bits")
    parser.add_argument("--revision", help="of a Hub checkpoint")
    return parser


def _write_one(
    model: Any, processing_class: Any, pattern: Pattern | None, target: Path, args: Any
) -> CompressionReport | None:
    """Compress a model and save it; without pattern the checkpoint is saved as it is, in plain tensors."""
    partial = start_folder(target)
    report = None
    try:
        _check_empty(target)  # again: start_folder brings back a family whose replacement was interrupted
        if pattern is not None:
            remove = args.remove or changes_shapes(pattern, storage=args.storage)
            pack = None if remove else _statistics(model, args)
            report = compress_model(model, pattern, args.include, args.exclude, remove, args.multiple_of)
            problem = renew_(model, pattern, pack, (args.include, args.exclude))
            if problem and remove:
                problem = "batch norms keep the statistics of the dense weights: none are stored for smaller layers"
            if problem:
                print(explained(problem))
        _fold_and_round(model, args)
        save_checkpoint(model, processing_class, partial, pattern, args.include, args.exclude, args.storage)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    commit_folder(partial, target)  # which keeps the folder where it fails
    return report


def _check_flags(args: Any, patterns: Sequence[Pattern]) -> None:
    """ValueError for a flag that would change nothing."""
    if args.multiple_of < 1:
        raise ValueError(f"multiple_of is a whole number of at least 1, got {args.multiple_of!r}")
    if args.multiple_of > 1 and not args.remove:
        raise ValueError(
            f"--multiple_of {args.multiple_of} rounds the widths that --remove leaves: pass --remove too, or drop it"
        )
    if args.remove and not any(isinstance(pattern, (LowRank, Grouped)) for pattern in patterns):
        raise ValueError(
            "remove=True changes shapes, which low_rank:SHARE, filters:SHARE, neurons:SHARE and heads:SHARE can; "
            f"{', '.join(map(str, patterns)) or 'no pattern'} writes zeros or rounds: drop it"
        )
    if (args.include or args.exclude) and not patterns and not args.half_rest:
        raise ValueError("--include and --exclude choose what a --pattern compresses: give one, or drop them")


def _fold_and_round(model: Any, args: Any) -> None:
    if args.fold_batch_norm:
        fold_batch_norm_(model)
    if args.half_rest:
        round_rest_(model, args.include, args.exclude)


def _statistics(model: Any, args: Any) -> StatisticsPack | None:
    """The batch-norm statistics that are stored beside the checkpoint."""
    from transformers.utils import cached_file

    if not batch_norm_statistics(model):
        return None
    return find_pack(model, [str(cached_file(args.model, "config.json", revision=args.revision))])


def _check_empty(target: Path) -> None:
    """One checkpoint never takes the place of a family, or of anything else."""
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; choose a new folder (only several patterns may replace a family)")


def load_checkpoint(name: str, revision: str | None = None) -> tuple[Any, Any]:
    """The model of a checkpoint in the class that saved it, and its tokenizer or image processor if it has one.

    Raises:
        ValueError: if there is no such checkpoint, or it is truncated or of an unknown class.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    if (Path(name) / MANIFEST).is_file():
        raise ValueError(f"{name} is a family; give one of its checkpoints, such as {Path(name) / 'dense'}")
    if revision is not None and Path(name).exists():
        raise ValueError(f"{name} is on this disk, where it has no revisions: --revision is of a Hub id; drop it")
    unreadable = (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ImportError, StrictDataclassError)
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        architecture = (config.architectures or [None])[0]
        if isinstance(config, transformers.TimmWrapperConfig):
            architecture = timm_class(config.to_dict())
            # timm's own files give num_classes here too, and transformers passes it a second time.
            config.model_args = {k: v for k, v in (config.model_args or {}).items() if k != "num_classes"}
        model, info = _model_class(name, architecture).from_pretrained(
            name,
            config=config,
            revision=revision,
            dtype="auto",
            output_loading_info=True,
            trust_remote_code=False,
        )
    except unreadable as error:
        where = "" if Path(name).exists() else "there is no such folder here, and as a Hub id: "
        raise ValueError(f"cannot load {name}: {where}{error}") from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"cannot load {name}: it comes with code of its own, and models with code of their own are not supported; "
            "give one of a class that transformers has"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{name} is incomplete: it lacks {len(missing)} weights of {architecture}, first {missing[0]}")
    return model, load_processors(name, revision)


def _model_class(name: str, architecture: Any) -> Any:
    """The class that saved a checkpoint; ValueError for what is none of transformers' models."""
    import transformers

    if architecture is None:
        return transformers.AutoModel
    found = getattr(transformers, architecture, None)
    if found is None:
        raise ValueError(f"{name} was saved by {architecture}, which this transformers does not have")
    if not hasattr(found, "base_model_prefix"):  # a function, a config, a tokenizer
        raise ValueError(f"{name} was saved by {architecture}, which is no model of transformers")
    return found
