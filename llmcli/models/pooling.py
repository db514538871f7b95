"""Pooling: how the states of a text's tokens become one vector, and what sentence-transformers' folders say of it.

Invariant: what a folder says and is not honoured is refused by name, so a vector is never another one in silence; what
is written here gives the same vectors in sentence-transformers. Reading imports no torch.

Source: `modules.json` and the folders of its modules, as sentence-transformers 2 to 6 write them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcli.errors import ConfigError, DataError
from llmcli.files.artefacts import read_json

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("none", "cls", "mean", "last", "max")
MODULES = "modules.json"
_POOLING = "1_Pooling"
_NORMALIZE = "2_Normalize"
_BERT = "sentence_bert_config.json"
_OWN = "config_sentence_transformers.json"
_FAR = 10**9  # what transformers puts as `model_max_length` where there is no limit is far above this
# Their names for a mode, in the old form (a flag each) and in the new one.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_THEIRS = {"cls": "cls", "max": "max", "mean": "mean", "lasttoken": "last"}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How a model makes vectors of texts."""

    mode: str = "mean"
    normalize: bool = False  # to length 1
    longest: int | None = None  # tokens of a text at most, where that is less than the model's positions
    lower: bool = False  # texts are written small before they are encoded
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what is put before a text, by purpose
    prompt: str | None = None  # the purpose that is meant where none is named


def read_pooling(folder: Path) -> Pooling | None:
    """What a folder of sentence-transformers says; None where it is no such folder (there is no `modules.json`).

    Raises ConfigError for a module or a setting that would change the vectors and is not honoured.
    """
    place = folder / MODULES
    if not place.is_file():
        return None
    mode = None
    normalize = False
    for kind, path in _modules(place):
        where = str(folder / path / "config.json")
        if kind == "Transformer" and path == "" and mode is None:
            continue
        if kind == "Pooling" and mode is None:
            mode = _mode_of(read_json(folder / path / "config.json"), where)
        elif kind == "Normalize" and mode is not None:
            said = read_json(folder / path / "config.json") if (folder / path / "config.json").is_file() else {}
            if said.get("module_input_name", "sentence_embedding") != "sentence_embedding":
                raise ConfigError(
                    "normalizes something else than the text's vector, which is not supported", where=where
                )
            normalize = True
        else:
            raise ConfigError(f"names the module {kind} at {path or '.'!r}, which is not supported", where=str(place))
    if mode is None:
        raise ConfigError("names no Pooling", where=str(place))
    bert = read_json(folder / _BERT) if (folder / _BERT).is_file() else {}
    own = read_json(folder / _OWN) if (folder / _OWN).is_file() else {}
    prompts = own.get("prompts") or {}
    prompt = own.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise ConfigError("prompts must be texts by name", where=str(folder / _OWN))
    if prompt is not None and prompt not in prompts:
        raise ConfigError(f"default_prompt_name is {prompt!r}, which is none of prompts", where=str(folder / _OWN))
    return Pooling(
        mode,
        normalize,
        _longest(folder, bert),
        bool(bert.get("do_lower_case", False)),
        {name: text or "" for name, text in prompts.items()},
        prompt,
    )


def _modules(place: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module, in order."""
    try:
        content = json.loads(place.read_text("utf-8"))
        found = [(entry["type"].rpartition(".")[2], entry["path"]) for entry in content]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError("is not a list of sentence-transformers' modules", where=str(place)) from error
    for _, path in found:
        if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
            raise DataError(f"names a path outside the folder: {path!r:.200}", where=str(place))
    return found


def _mode_of(said: Mapping[str, Any], where: str) -> str:
    modes = said.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if said.get(flag)] or "mean"
    names = [modes] if isinstance(modes, str) else list(modes)
    if len(names) != 1 or names[0] not in _THEIRS:
        raise ConfigError(f"pools by {' and '.join(map(str, names))}, which is not supported", where=where)
    if said.get("include_prompt", True) is not True:
        raise ConfigError("include_prompt must be true: a prompt that is left out is not supported", where=where)
    return _THEIRS[names[0]]


def _longest(folder: Path, bert: Mapping[str, Any]) -> int | None:
    """The tokens that sentence-transformers would cut a text to."""
    tokenizer = folder / "tokenizer_config.json"
    said = bert.get("max_seq_length")
    if said is None and tokenizer.is_file():
        said = read_json(tokenizer).get("model_max_length")
    if said is None or (isinstance(said, int | float) and said > _FAR):
        return None
    if type(said) is not int or said < 1:
        raise ConfigError(f"max_seq_length must be a number of tokens, is {said!r}", where=str(folder / _BERT))
    return said


def write_pooling(folder: Path, pooling: Pooling, hidden_size: int) -> None:
    """Writes sentence-transformers' files beside a model, into the staged folder that holds it.

    In the form of its version 2, which every later one reads.
    """
    mode = next(theirs for theirs, ours in _THEIRS.items() if ours == pooling.mode)
    modules = [("", "Transformer"), (_POOLING, "Pooling"), *([(_NORMALIZE, "Normalize")] if pooling.normalize else [])]
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    flags = {flag: found == mode for flag, found in _FLAGS.items()}
    contents: dict[str, Any] = {
        MODULES: listed,
        f"{_POOLING}/config.json": {"word_embedding_dimension": hidden_size, **flags, "include_prompt": True},
        _BERT: {"max_seq_length": pooling.longest, "do_lower_case": pooling.lower},
        _OWN: {"prompts": dict(pooling.prompts), "default_prompt_name": pooling.prompt},
    }
    if pooling.normalize:
        contents[f"{_NORMALIZE}/config.json"] = {}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


# ----------------------------------------------------------------------------------------------------------------
# Vectors


def pooled(states: Tensor, lengths: Tensor, mode: str) -> Tensor:
    """One vector a text, float32: states (N, C) of texts side by side, their lengths (R,) -> (R, C).

    Every token counts, those too that the tokenizer puts around a text. Gradients flow through it.
    """
    import torch

    if mode in ("cls", "last"):
        ends = lengths.cumsum(0)
        return states.index_select(0, ends - lengths if mode == "cls" else ends - 1).float()
    wide = states.float()
    if mode == "max":
        return torch.segment_reduce(wide, "max", lengths=lengths, axis=0)
    if mode != "mean":
        raise ValueError(f"{mode!r} gives no vector")
    owners = torch.repeat_interleave(lengths)
    return wide.new_zeros(len(lengths), wide.size(1)).index_add(0, owners, wide) / lengths[:, None]
