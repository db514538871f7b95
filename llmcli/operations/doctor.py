"""`doctor`: what this machine offers and what is missing.

Invariant: a finding is what was tried here, not what a version promises; nothing is changed and no socket is opened.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from llmcli.data.cores import available_cores

# What each extra serves; which packages it holds is read from the installed package's own metadata.
EXTRAS = {
    "data": "parquet, zstd, encodings, near duplicates, fast encoding",
    "plot": "curves as images",
    "eval": "ROUGE and statistics",
    "grammar": "constrained output",
    "gguf": "GGUF files",
    "hub": "downloads from a hub",
}
# Instruction sets that decide speed: the name shown, and what Linux calls it in /proc/cpuinfo.
INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "neon": "asimd",
    "i8mm": "i8mm",
}
LEAST_FREE_BYTES = 2_000_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: `level` is ok, note (good to know) or missing (something needed does not work)."""

    topic: str
    name: str
    value: str
    level: str = "ok"
    advice: str = ""


def examine(folder: str | Path = ".") -> Iterator[Finding]:
    """Yields a finding for everything that matters to speed or success; `folder` is where free space is looked for."""
    yield Finding("system", "llmcli", metadata.version("llmcli"))
    yield _python()
    yield Finding("system", "platform", platform.platform())
    yield _memory()
    yield from _packages()
    yield from _cores()
    yield from _instruction_sets()
    yield from _accelerators()
    yield from _providers()
    yield _compiler()
    yield _disk(Path(folder))
    yield _console()
    yield from _extras()


def _python() -> Finding:
    new_enough = sys.version_info >= (3, 11)
    advice = "" if new_enough else "llmcli needs Python 3.11 or newer"
    return Finding("system", "python", platform.python_version(), "ok" if new_enough else "missing", advice)


def requirements(extra: str = "") -> list[str]:
    """The names of the packages that llmcli needs, or that one of its extras adds."""
    found = []
    for line in metadata.requires("llmcli") or []:
        requirement, _, marker = line.partition(";")
        wanted = re.search(r"extra == ['\"]([\w-]+)", marker)
        if (wanted[1] if wanted else "") == extra:
            found.append(re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0])
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    for package in requirements():
        version = _version(package)
        if version:
            yield Finding("packages", package, version)
        else:
            yield Finding("packages", package, "not installed", "missing", f"pip install {package}")


def _cores() -> Iterator[Finding]:
    seen, usable = os.cpu_count() or 1, available_cores()
    why = ": the affinity or the container's quota allows no more" if usable < seen else ""
    yield Finding("processor", "cores", f"{usable} of {seen}{why}")
    yield Finding("processor", "model", _processor_name())
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit() and int(threads) > usable:
        advice = f"OMP_NUM_THREADS asks for more threads than the {usable} cores: unset it"
        yield Finding("processor", "OMP_NUM_THREADS", threads, "note", advice)


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    try:
        block = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n", 1)[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}


def _processor_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _flags() -> set[str]:
    """What the processor can do, as Linux calls it; empty where that is not known."""
    info = _cpuinfo()
    return set((info.get("flags") or info.get("Features") or "").split())


def has_int8_products() -> bool | None:
    """Whether the processor has dot products of int8 (VNNI and its like); None: not known."""
    flags = _flags()
    return bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"}) if flags else None


def _instruction_sets() -> Iterator[Finding]:
    flags = _flags()
    if not flags:
        yield Finding("processor", "instruction sets", "not known on this system", "note")
        return
    found = [name for name, flag in INSTRUCTION_SETS.items() if flag in flags]
    yield Finding("processor", "instruction sets", ", ".join(found) or "none that matter")
    if not has_int8_products():
        advice = "int8 models may run slower than float ones here: measure with llmcli bench"
        yield Finding("processor", "int8", "no dot product instructions", "note", advice)
    has_bf16 = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    yield Finding("processor", "bfloat16", "in hardware" if has_bf16 else "none: training runs in float32")


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return Finding("system", "memory", "not known", "note")
    limits = [total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path("/sys/fs/cgroup", name).read_text("ascii")))
        except (OSError, ValueError):
            continue
    return Finding("system", "memory", f"{min(limits) / 1e9:.1f} GB")


def _accelerators() -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation raises whatever its loader met
        yield Finding("accelerators", "torch", f"does not load: {_line(error)}", "missing", "reinstall torch")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            told = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"
            yield Finding("accelerators", f"cuda:{index}", told)
    else:
        yield Finding("accelerators", "cuda", "none" if torch.version.cuda else "none (this torch is built without)")
    if sys.platform == "darwin":
        yield Finding("accelerators", "mps", "works" if torch.backends.mps.is_available() else "none")


def _providers() -> Iterator[Finding]:
    """Each provider that onnxruntime names is tried with a model of one node: a listed one may still not load."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        model = _one_node_model()
    except Exception as error:
        yield Finding(
            "onnxruntime", "onnxruntime", f"does not load: {_line(error)}", "missing", "reinstall onnxruntime"
        )
        return
    for provider in onnxruntime.get_available_providers():
        if provider == "AzureExecutionProvider":  # talks to a service: nothing of ours uses it
            continue
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        needed = provider == "CPUExecutionProvider"
        try:
            session = onnxruntime.InferenceSession(model, options, providers=[provider])
            loaded = provider in session.get_providers()
            reason = "" if loaded else "fell back to the processor"
        except Exception as error:
            loaded, reason = False, _line(error)
        if loaded:
            yield Finding("onnxruntime", provider, "loads")
        else:
            yield Finding("onnxruntime", provider, f"does not load: {reason}", "missing" if needed else "note")


def _one_node_model() -> bytes:
    """An ONNX model that returns its input."""
    import onnx_ir as ir

    value = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", inputs=[value], version=17)
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", value.shape, value.type
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 17}, name="one")
    content = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    return bytes(content)


def _compiler() -> Finding:
    """torch.compile needs a C++ compiler on the processor."""
    chosen = os.environ.get("CXX", "")
    found = next((path for name in (chosen, "g++", "clang++", "c++") if name and (path := shutil.which(name))), None)
    if found:
        return Finding("compiler", "torch.compile", found)
    advice = "training is not compiled without one: install g++ or clang"
    return Finding("compiler", "torch.compile", "no C++ compiler", "note", advice)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    little = free < LEAST_FREE_BYTES
    return Finding(
        "disk", "free here", f"{free / 1e9:.1f} GB", "note" if little else "ok", "checkpoints may not fit" * little
    )


def _console() -> Finding:
    encoding = sys.stdout.encoding or "none"
    utf8 = encoding.lower().replace("-", "") == "utf8"
    advice = "" if utf8 else "curves and bars are drawn in ASCII; PYTHONUTF8=1 changes it"
    return Finding("console", "encoding", encoding, "ok" if utf8 else "note", advice)


def _extras() -> Iterator[Finding]:
    for extra, purpose in EXTRAS.items():
        absent = [package for package in requirements(extra) if _version(package) is None]
        if absent:
            advice = f"pip install 'llmcli[{extra}]'"
            yield Finding("extras", extra, f"{purpose}: without {', '.join(absent)}", "note", advice)
        else:
            yield Finding("extras", extra, purpose)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
