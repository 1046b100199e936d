"""What stands beside the weights of a checkpoint: its tokenizer and processors, and files that none of them writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..loading.base import IF_THERE

# A tokenizer has one of these; without any, transformers makes up an empty one.
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "vocab-src.json",
    "prophetnet.tokenizer",
    "tekken.json",
)
_WHOLE, _IMAGE, _VIDEO = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
_OF_SENTENCES = (
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


class Processors:
    """Tokenizer and processors of one checkpoint that no single class holds, saved together.

    Args:
        *parts: each with `save_pretrained`.
    """

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files of all parts into a folder."""
        for part in self.parts:
            part.save_pretrained(folder)


def load_processors(name: str, revision: str | None) -> Any:
    """Tokenizer, image processor or both of a checkpoint; None where it has no file of one."""
    import transformers as t

    has_tokenizer = _has(name, revision, *_TOKENIZER_FILES)
    whole = None
    if has_tokenizer or _has(name, revision, _WHOLE):
        whole = _first_of(name, revision, [t.AutoProcessor], is_needed=not has_tokenizer)
    if isinstance(whole, t.ProcessorMixin):
        return whole
    parts = [_first_of(name, revision, [t.AutoTokenizer])] if has_tokenizer else [whole]
    if _has(name, revision, _IMAGE):
        parts.append(_first_of(name, revision, [t.AutoImageProcessor, t.AutoFeatureExtractor]))
    if _has(name, revision, _VIDEO):
        parts.append(_first_of(name, revision, [t.AutoVideoProcessor]))
    parts = [part for part in parts if part is not None]
    return Processors(*parts) if len(parts) > 1 else next(iter(parts), None)


def say_left_out(name: str, revision: str | None, folder: Path) -> None:
    """Print which files for tokenizers, processors and sentence-transformers a checkpoint has and its copy lacks."""

    def lacks(*files: str) -> list[str]:
        return [file for file in files if not (folder / file).is_file() and _has(name, revision, file)]

    # Tokenizers are written in other files than they were read from, and a whole processor in one of its own.
    has_tokenizer = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    has_whole = (folder / _WHOLE).is_file()
    lacking = [*([] if has_tokenizer else lacks(*_TOKENIZER_FILES)), *([] if has_whole else lacks(_WHOLE))]
    lacking += [*([] if has_whole else lacks(_IMAGE, _VIDEO)), *lacks(*_OF_SENTENCES)]
    if lacking:
        print(f"left out: {', '.join(lacking)} of {name}, which the output lacks: copy what you need", file=sys.stderr)


def _has(name: str, revision: str | None, *files: str) -> bool:
    from transformers.utils import cached_file

    return any(cached_file(name, file, revision=revision, **IF_THERE) is not None for file in files)


def _first_of(name: str, revision: str | None, kinds: list[Any], is_needed: bool = True) -> Any:
    """What the first class that can loads; None, and a word about it where it is needed, if none can."""
    problem: Exception | None = None
    for kind in kinds:
        try:
            return kind.from_pretrained(name, revision=revision, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            problem = error
    if is_needed:
        why = "code of its own is not supported" if "trust_remote_code" in str(problem) else problem
        print(f"left out: the tokenizer or processor of {name}, which cannot be loaded: {why}", file=sys.stderr)
    return None
