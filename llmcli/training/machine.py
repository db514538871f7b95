"""The machine: device, precision, compiler and threads, decided once and written down.

Invariant: what is asked for and not there is an error; the CPU is never used in silence (onnxruntime #23372).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import torch

from llmcli.data.cores import available_cores
from llmcli.data.heap import keep_heap
from llmcli.errors import UsageError

# Below this width the casts of bfloat16 cost on a CPU what its products save (docs/log.md, "Precision").
_NARROW = 64


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and how a model is trained."""

    device: str
    precision: str
    compile: bool
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


def choose_device(wanted: str) -> str:
    """The device for "auto", or the one that is wanted. Raises UsageError where it does not work."""
    works = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if works[name])
    if not works[wanted]:
        raise UsageError(f"no working {wanted} device was found; see llmcli doctor", where="--device")
    return wanted


def choose_precision(wanted: str, device: str, hidden_size: int) -> str:
    """bfloat16 where the hardware multiplies it fast and the model is wide enough, else float32."""
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if device == "cpu":
        return "bfloat16" if hidden_size >= _NARROW and has_fast_bfloat16() else "float32"
    return "float32"


def has_fast_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has AVX512-BF16 or AMX, whose products in bfloat16 beat float32."""
    try:
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


def compiler_found(device: str) -> bool:
    """Whether torch.compile has what it needs here: a C++ compiler, on CUDA Triton."""
    if device == "cuda":
        from importlib.util import find_spec

        return find_spec("triton") is not None
    return device == "cpu" and any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def prepare_machine(machine: Machine) -> None:
    """Sets threads, precision of products and, on the CPU, what becomes of freed memory, for the process."""
    torch.set_num_threads(machine.threads)
    if machine.device == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        keep_heap()


def choose_threads(wanted: int | None) -> int:
    """CPU threads: what is wanted, else the cores this process may use."""
    return wanted or available_cores()
