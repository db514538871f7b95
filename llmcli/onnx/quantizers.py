"""The quantizers that need nothing of the model but a matrix, and perhaps the moments of its inputs, by name.

`sequential.Sequential` is not among them: it follows one model's computation and is made for it.
"""

from __future__ import annotations

from llmcli.onnx.least_error import LeastError
from llmcli.onnx.quantize import Quantizer, RoundToNearest
from llmcli.onnx.scale_search import ScaleSearch

QUANTIZERS: dict[str, type[Quantizer]] = {"round": RoundToNearest, "search": ScaleSearch, "calibrated": LeastError}
