"""Manifests: name, size and sha256 of every file of a folder, written last, and the lineage of what it holds.

Invariant: a folder whose manifest verifies is exactly what was written (RELIABILITY, decision 2).
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcli.errors import DataError, from_os_error
from llmcli.files.atomic import TEMPORARY, write_json

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise from_os_error(error, path) from error
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result, for the lineage."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("llmcli", "torch", "tokenizers", "numpy", "onnx-ir", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _files(folder: Path) -> list[Path]:
    paths = (path for path in folder.rglob("*") if path.is_file() and TEMPORARY not in path.name)
    return sorted(path for path in paths if path != folder / MANIFEST and path.name != ".lock")


def write_manifest(folder: Path, lineage: Mapping[str, Any]) -> None:
    """Writes `manifest.json` for all files below `folder`. `lineage`: hashes of its origins, seed, versions."""
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in _files(folder)
    }
    write_json(folder / MANIFEST, {"files": entries, "lineage": dict(lineage)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content. Raises DataError when it is missing or not what it should be."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content["files"], dict) or not isinstance(content["lineage"], dict):
            raise DataError("is not a manifest", where=str(path))
    except OSError as error:
        raise from_os_error(error, path) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError("is not a manifest", where=str(path)) from error
    return dict(content)


def manifest_problems(folder: Path) -> list[str]:
    """What is wrong with a folder, held against its manifest: a line for each file; empty when all is well."""
    try:
        files = read_manifest(folder)["files"]
    except DataError as error:
        return [str(error)]
    problems = []
    for name, entry in sorted(files.items()):
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            problems.append(f"{name}: the manifest names a path outside the folder")
        elif not isinstance(entry, dict) or not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry.get("size"):
            problems.append(f"{name}: {path.stat().st_size} bytes, the manifest says {entry.get('size')}")
        elif sha256_of(path) != entry.get("sha256"):
            problems.append(f"{name}: its sha256 is not the manifest's")
    known = {folder / name for name in files}
    problems += [f"{path.relative_to(folder)}: not in the manifest" for path in _files(folder) if path not in known]
    return problems
