"""`convert`: a file of another program to a model folder as Hugging Face lays it out.

Invariant: the output place holds a whole model, or what it held before; a file is read to its end by what its header
says, or refused before anything is written.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

from llmcli import config as configs
from llmcli.config import ConvertConfig
from llmcli.data.scored_bpe import ROLES, scored_bpe
from llmcli.errors import DataError, from_os_error
from llmcli.files.artefacts import size_of
from llmcli.files.atomic import refuse_existing, staged_folder, write_json
from llmcli.files.llama2c import Llama2cTokenizer, is_llama2c, read_model, read_tokenizer
from llmcli.files.manifest import sha256_of, versions, write_manifest
from llmcli.files.tensors import stream_weights
from llmcli.models.config import write_config
from llmcli.operations.records import Progress

_BEGIN, _END = 1, 2  # llama2.c's ids
# What other files begin with, to say what they are.
_STRANGERS = {
    b"GGUF": "is a GGUF file of llama.cpp",
    b"ggjt": "is a GGML file of llama.cpp",
    b"PK\x03\x04": "is a zip file, perhaps a pickle of torch",
    b"\x80\x02": "is a pickle, which is never read",
    b"\x08\x07": "is an ONNX graph",
}


@dataclasses.dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was made."""

    output: str
    format: str  # of the file that was read
    version: int
    family: str
    parameters: int
    vocab_size: int
    context: int
    size_bytes: int
    seconds: float


def convert(
    file: str | Path,
    output: str | Path,
    config: ConvertConfig = ConvertConfig(),  # noqa: B008  (frozen)
    *,
    overwrite: bool = False,
) -> Iterator[Progress | ConvertReport]:
    """Converts a file with its tokenizer. Yields Progress, last a ConvertReport.

    Raises DataError for a file that is of no known format, or not what its header says.
    """
    configs.check(config)
    refuse_existing(output, overwrite=overwrite)
    source = Path(file)
    kind = _format_of(source) if config.format == "auto" else config.format
    yield from _READERS[kind](source, output, config, overwrite)


def _format_of(path: Path) -> str:
    """The format of a file by how it begins. Raises DataError, naming what is expected."""
    expected = f"expected: {', '.join(_READERS)} (a .bin of float32 weights, version 0 or 1)"
    if path.is_dir():
        raise DataError(f"is a folder; {expected}", where=str(path))
    try:
        with open(path, "rb") as opened:
            head = opened.read(28)
    except OSError as error:
        raise from_os_error(error, path) from error
    told = next((text for start, text in _STRANGERS.items() if head.startswith(start)), None)
    if told is None and head[8:9] == b"{":
        told = "is a safetensors file, which needs no conversion in its folder"
    if told is None and is_llama2c(head):
        return "llama2.c"
    raise DataError(f"{told or 'is of no known format'}; {expected}", where=str(path))


def _llama2c(
    source: Path, output: str | Path, config: ConvertConfig, overwrite: bool
) -> Iterator[Progress | ConvertReport]:
    from llmcli.models.llama2c import decoder_config, tensors_of

    began = time.perf_counter()
    model = read_model(source)
    shape = decoder_config(model)
    tokens = read_tokenizer(_tokenizer_of(source, config.tokenizer, model.vocab_size), model.vocab_size)
    content = scored_bpe(tokens.pieces, tokens.scores, str(tokens.path))
    tensors = tensors_of(model)
    total, done = sum(tensor.size for tensor in tensors), 0
    with staged_folder(output, overwrite=overwrite) as staged:
        for size in stream_weights(tensors, staged):
            done += size
            yield Progress("convert", done, total, "bytes")
        special = {"bos_token_id": _BEGIN, "eos_token_id": _END, "pad_token_id": None}
        write_json(staged / "config.json", write_config(shape, special, "float32"))
        # run.c ends a text at the next one's begin: its training puts no other mark between texts.
        write_json(staged / "generation_config.json", {"bos_token_id": _BEGIN, "eos_token_id": [_END, _BEGIN]})
        _write_tokenizer(staged, content, model.seq_len)
        write_manifest(staged, _lineage(source, tokens))
        size = size_of(staged)
    yield ConvertReport(
        output=str(output),
        format="llama2.c",
        version=model.version,
        family=shape.model_type,
        parameters=total // 4,
        vocab_size=model.vocab_size,
        context=model.seq_len,
        size_bytes=size,
        seconds=round(time.perf_counter() - began, 3),
    )


def _tokenizer_of(source: Path, given: str | None, vocab_size: int) -> Path:
    """The tokenizer's file: what was given, else what llama2.c calls it, beside the model."""
    if given is not None:
        return Path(given)
    names = (f"tok{vocab_size}.bin", "tokenizer.bin")
    for name in names:
        if (source.parent / name).is_file():
            return source.parent / name
    raise DataError(f"no tokenizer beside it ({' or '.join(names)}); name it: --tokenizer FILE", where=str(source))


def _write_tokenizer(staged: Path, content: dict[str, object], context: int) -> None:
    write_json(staged / "tokenizer.json", content)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, **ROLES}
    write_json(staged / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False})


def _lineage(source: Path, tokens: Llama2cTokenizer) -> dict[str, object]:
    files = {path.name: sha256_of(path) for path in (source, tokens.path)}
    return {"parent": files, **versions()}


_READERS = {"llama2.c": _llama2c}
