"""Opening a model folder with the engine that its files ask for.

Invariant: an ONNX folder runs on onnxruntime and torch is not imported; a folder of safetensors runs on torch.
"""

from __future__ import annotations

from pathlib import Path

from llmcli.errors import UsageError
from llmcli.files.artefacts import ModelPlace, is_onnx
from llmcli.runtime.session import Session


def open_session(
    folder: str | Path | ModelPlace,
    *,
    device: str = "auto",
    threads: int | None = None,
    quantize: str | None = None,
) -> Session:
    """Loads a model folder. `device`: auto, cpu, cuda or mps; one that does not work is an error, never another.

    `quantize`: int8 or int4, to which weights are rounded as they are read (folders of safetensors).
    """
    found = folder if isinstance(folder, ModelPlace) else ModelPlace(Path(folder))
    place = found.folder
    if not is_onnx(place):
        from llmcli.runtime.torch_session import open_session as open_torch

        return open_torch(place, device=device, threads=threads, quantize=quantize, adapter=found.adapter)
    if quantize is not None:
        raise UsageError(
            "an ONNX folder has the precision of its export; give the model that was exported", where="--quantize"
        )
    if device == "mps":
        raise UsageError("ONNX folders run on cpu or cuda; mps needs the model that was exported", where="--device")
    from llmcli.runtime.onnx_session import OnnxSession

    return OnnxSession(place, threads=threads, device="cuda" if device == "cuda" else "cpu")
