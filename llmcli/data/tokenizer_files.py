"""The files of a tokenizer: found, read, checked before a library sees them.

Layouts: the Hugging Face one (`tokenizer.json`, `tokenizer_config.json`, older `special_tokens_map.json`) and GPT-2's
pair (`vocab.json`, `merges.txt` with or without a `#version` line).

Invariant: whatever a file holds, reading it ends in a tokenizer or in one DataError that names the file and the fault.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmcli.data.pretokenizer import PUBLISHED_PATTERNS
from llmcli.errors import DataError, LlmcliError, from_os_error
from llmcli.files import artefacts

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
END_OF_TEXT = "<|endoftext|>"
ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
_FRAME = ("cls", "sep", "mask")  # an encoder's; one that the vocabulary lacks is no fault of a tokenizer

_LARGEST_FILE = 256 << 20  # bytes; the largest published tokenizer.json have 35 MB
_LARGEST_ID = 1 << 22  # the largest published vocabularies have 262,144 tokens; tables are as long as the greatest id
# Tokens that play a role in published tokenizers, for a tokenizer.json that stands alone.
_CUSTOMARY = {
    "eos": (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[SEP]"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]"),
    "pad": ("<pad>", "[PAD]"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What a tokenizer's files hold: text and content of tokenizer.json, the settings beside it, the chat template."""

    where: str
    text: str
    content: Mapping[str, Any]
    config: Mapping[str, Any]
    chat_template: str | None = None


def read_files(path: str | Path) -> TokenizerFiles:
    """Reads a tokenizer from a folder (a tokenizer's, model's, run's or corpus'), a tokenizer.json or a vocab.json."""
    place = Path(path)
    if not place.exists():
        raise DataError("no such file or folder", where=str(path))
    if place.is_dir():
        place = _in_folder(place)
    if place.name in ("vocab.json", "merges.txt"):
        text, config = _pair(place.parent), _config(place.parent)
    else:
        text, config = _read_text(place), _config(place.parent)
    content = _parse(text, str(place))
    check_content(content, str(place))
    return TokenizerFiles(str(path), text, content, config, _template(place.parent, config))


def _in_folder(folder: Path) -> Path:
    """The file to read in a folder; a run's is that of its model."""
    for name in (TOKENIZER, "vocab.json"):
        if (folder / name).is_file() and (name == TOKENIZER or (folder / "merges.txt").is_file()):
            return folder / name
    try:
        inner = artefacts.resolve_model(folder)
    except LlmcliError:
        inner = folder
    if inner != folder:
        return _in_folder(inner)
    raise DataError(f"holds no tokenizer ({TOKENIZER}, or vocab.json with merges.txt)", where=str(folder))


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise DataError(f"has {size >> 20} MB; a tokenizer has at most {_LARGEST_FILE >> 20} MB", where=str(path))
        return path.read_text("utf-8")
    except OSError as error:
        raise from_os_error(error, path) from error
    except UnicodeDecodeError as error:
        raise DataError(f"is not valid UTF-8 (byte {error.start})", where=str(path)) from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"is not valid JSON: {error.msg}", where=f"{where}:{error.lineno}:{error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 100,000 brackets
        raise DataError("is not valid JSON: nested too deeply, or a number too long", where=where) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise DataError("is not a tokenizer of the Hugging Face format: it has no model", where=where)
    return content


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what only the older special_tokens_map.json says."""
    config: dict[str, Any] = {}
    for name in (SPECIAL_MAP, CONFIG):
        if (folder / name).is_file():
            config |= artefacts.read_json(folder / name)
    try:
        json.dumps(config, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError("holds half a surrogate pair, which is no character", where=str(folder / CONFIG)) from error
    return config


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / TEMPLATE).is_file():
        return _read_text(folder / TEMPLATE)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _pair(folder: Path) -> str:
    """GPT-2's pair as the text of a tokenizer.json."""
    vocabulary = artefacts.read_json(folder / "vocab.json")
    merges_path = folder / "merges.txt"
    merges = []
    for number, line in enumerate(_read_text(merges_path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise DataError(f"must hold two tokens and a space between, is {line!r}", where=f"{merges_path}:{number}")
        merges.append(parts)
    added = []
    if isinstance(vocabulary.get(END_OF_TEXT), int):
        added.append(added_token(vocabulary[END_OF_TEXT], END_OF_TEXT))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    return json.dumps(content, ensure_ascii=False)


def added_token(identity: int, content: str) -> dict[str, Any]:
    """A special token as tokenizer.json lists it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": identity, "content": content, **flags}


# ----------------------------------------------------------------------------------------------------------------
# Checks


def check_content(content: Mapping[str, Any], where: str) -> None:
    """Raises DataError for what the tokenizers library would take and stumble over later."""
    model = content["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        ids = list(vocabulary.values())
    elif isinstance(vocabulary, list):
        ids = list(range(len(vocabulary)))
    else:
        raise DataError("is not a tokenizer of the Hugging Face format: its model has no vocabulary", where=where)
    if any(not isinstance(identity, int) or not 0 <= identity < _LARGEST_ID for identity in ids):
        raise DataError(f"an id of the vocabulary is not a whole number below {_LARGEST_ID:,}", where=where)
    if len(set(ids)) != len(ids):
        raise DataError("the vocabulary gives one id to two tokens", where=where)
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise DataError("the added tokens are no list", where=where)
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise DataError("an added token has no content", where=where)
        if not token["content"]:
            raise DataError(f"the added token with id {token.get('id')} is empty", where=where)
        if not isinstance(token.get("id"), int) or not 0 <= token["id"] < _LARGEST_ID:
            raise DataError(f"the added token {token['content']!r} has no id below {_LARGEST_ID:,}", where=where)
    unknown = model.get("unk_token")
    if not isinstance(unknown, str | None) or not isinstance(model.get("unk_id"), int | None):
        raise DataError("the unknown token of the model is no text, or its id no number", where=where)
    if unknown and model.get("type") in ("WordLevel", "WordPiece") and unknown not in vocabulary:
        raise DataError(f"the unknown token {unknown!r} is not in the vocabulary", where=where)
    if model.get("type") == "Unigram" and not (model.get("unk_id") or 0) < max(1, len(ids)):
        raise DataError(f"the unknown token's id {model.get('unk_id')} is not in the vocabulary", where=where)


def has_strange_patterns(content: Mapping[str, Any]) -> bool:
    """Whether there is a regular expression beside the published ones, which never make the engine give up."""
    return any(pattern not in PUBLISHED_PATTERNS for pattern in _patterns(content))


def _patterns(value: Any) -> Iterator[str]:
    parts = [value.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if isinstance(part.get("Regex"), str):
                yield part["Regex"]
            parts.extend(part.values())
        elif isinstance(part, list):
            parts.extend(part)


def role_tokens(files: TokenizerFiles, known: Mapping[str, int]) -> dict[str, str | None]:
    """Which token plays each role: what the settings say; where there are none, what is customary."""
    found: dict[str, str | None] = {}
    for role in ROLES:
        value = files.config.get(f"{role}_token")
        token = value.get("content") if isinstance(value, dict) else value
        # The settings of old BERTs do not name their frame.
        if token is None and (role in _FRAME or not files.config):
            token = next((name for name in _CUSTOMARY.get(role, ()) if name in known), None)
        if token is not None and (not isinstance(token, str) or token not in known):
            if role in _FRAME:
                found[role] = None
                continue
            raise DataError(f"the {role} token {token!r} of {CONFIG} is not in the vocabulary", where=files.where)
        found[role] = token
    if found["unk"] is None:
        unknown = files.content["model"].get("unk_token")
        found["unk"] = unknown if unknown in known else None
    return found
