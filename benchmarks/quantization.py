"""Quality of int4 and int8 beside llama.cpp's formats, on the same weights and text.

    python benchmarks/quantization.py -m MODEL --text FILE... --llama-python PYTHON

MODEL: a trained folder of the families llama or qwen3. Each way of ours is exported and scored as it runs, activations
quantized too; llama.cpp's files are read back with the package gguf and scored in float32, its own activations being
quantized to int8 as well when it runs. The intervals are of the paired differences, by the bootstrap over windows.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WINDOW = 512  # tokens, or the model's context
FORMATS = ("Q4_K_M", "Q4_0", "Q8_0")
# name -> settings of the export
WAYS: dict[str, dict[str, Any]] = {
    "int4 round": {"precision": "int4", "quantizer": "round"},
    "int4 search": {"precision": "int4", "quantizer": "search"},
    "int4 calibrated": {"precision": "int4", "quantizer": "calibrated"},
    "int4 sequential, same": {"precision": "int4", "quantizer": "sequential", "embedding": "same"},
    "int4 sequential": {"precision": "int4", "quantizer": "sequential"},
    "int4 sequential, 64": {"precision": "int4", "quantizer": "sequential", "block_size": "64"},
    "int4 search, 64": {"precision": "int4", "quantizer": "search", "block_size": "64"},
    "int4 search, mixed": {"precision": "int4", "quantizer": "search", "embedding": "mixed"},
    "int8": {"precision": "int8"},
    "int8 weight-only": {"precision": "int8", "quantizer": "weight-only"},
}
BARS = {"int4 sequential": (1.5, 4.6), "int8": (0.5, None), "int8 weight-only": (0.1, None)}  # percent, bits a weight


def read_back(model: Path, file: Path, target: Path) -> None:
    """By llama.cpp's interpreter: a GGUF file's weights, in float32, as a model folder; prints its bits a weight."""
    import gguf
    import numpy as np

    config = json.loads((model / "config.json").read_text())
    heads, narrow = config["num_attention_heads"], config["num_key_value_heads"]
    arch = getattr(gguf.MODEL_ARCH, config["model_type"].upper())
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    reader = gguf.GGUFReader(str(file))
    found = {tensor.name: tensor for tensor in reader.tensors}
    header: dict[str, Any] = {}
    arrays, place, bits, weights = [], 0, 0, 0
    for source in sorted(model.glob("*.safetensors")):
        with open(source, "rb") as stream:
            entries = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            tensor = found[names.get_name(name, (".weight",))]
            array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(entry["shape"])
            if array.ndim == 2:
                bits, weights = bits + 8 * tensor.n_bytes, weights + array.size
            if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                parts = heads if name.endswith("q_proj.weight") else narrow
                array = array.reshape(parts, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
            header[name] = {
                "dtype": "F32", "shape": entry["shape"], "data_offsets": [place, place + array.nbytes]
            }  # fmt: skip
            place += array.nbytes
            arrays.append(np.ascontiguousarray(array))
    target.mkdir()
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with open(target / "model.safetensors", "wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        for array in arrays:
            stream.write(array.tobytes())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((model / name).read_bytes())
    print(json.dumps(bits / weights))


def windows_of(model: Path, texts: list[str], count: int) -> dict[str, Any]:
    """Ids of each text, in rows of a window: (count, window)."""
    import numpy as np

    from llmcli.config import TextConfig
    from llmcli.data.readers import read_documents
    from llmcli.data.tokenizer import load_tokenizer

    tokenizer, found = load_tokenizer(model), {}
    window = min(WINDOW, json.loads((model / "config.json").read_text())["max_position_embeddings"])
    for text in texts:
        ids: list[int] = []
        for document in read_documents([text], TextConfig()):
            ids += [*tokenizer.encode(document.text[: 1 << 20]), *filter(None, [tokenizer.eos_id])]
            if len(ids) > 4 * count * window:
                break
        rows = min(count, len(ids) // window)
        found[Path(text).parent.name + "/" + Path(text).name] = np.array(ids[: rows * window]).reshape(rows, window)
    return found


def logits_of(folder: Path, rows: Any) -> Any:
    """Log-probabilities (rows, window - 1, V) of a folder, as it runs."""
    import numpy as np

    from llmcli.runtime.open import open_session

    session, found = open_session(folder), []
    for row in rows:
        session.start([row[:1].tolist()])
        logits = session.feed(row[None, 1:], keep=len(row) - 1)[0].astype(np.float64)
        first = session.start([row[:1].tolist()])[0].astype(np.float64)
        whole = np.concatenate((first[None], logits))[:-1]
        whole -= np.log(np.exp(whole - whole.max(-1, keepdims=True)).sum(-1, keepdims=True)) + whole.max(
            -1, keepdims=True
        )
        found.append(whole.astype(np.float32))
    session.close()
    return np.stack(found)


def compared(exact: Any, found: Any, rows: Any) -> dict[str, float]:
    """Increase of perplexity in percent with its half 95 % interval, KL divergence, agreement of the first choice."""
    import numpy as np

    wanted = rows[:, 1:, None]
    nats = np.take_along_axis(exact, wanted, -1) - np.take_along_axis(found, wanted, -1)  # (rows, window - 1, 1)
    each = nats.mean((1, 2))
    draws = np.random.default_rng(0).integers(0, len(each), (1000, len(each)))
    spread = np.percentile(each[draws].mean(1), (2.5, 97.5))
    return {
        "increase": 100 * math.expm1(each.mean()),
        "half": 50 * float(spread[1] - spread[0]),
        "kl": float((np.exp(exact) * (exact - found)).sum(-1).mean()),
        "top1": float((exact.argmax(-1) == found.argmax(-1)).mean()),
    }


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 below a bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument(
        "--text", nargs="+", default=[], help="texts to measure on; none of it may have been trained on"
    )
    parser.add_argument("--calibration", help="text to calibrate on, of the kind of the training text")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python and gguf")
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens or the context, of each text")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        read_back(*map(Path, options.job))
        return
    if not options.text:
        parser.error("there is nothing to measure on: --text FILE...")
    from llmcli.config import ExportConfig
    from llmcli.files.artefacts import resolve_model
    from llmcli.operations.export import export

    model = resolve_model(options.model, onnx=False)
    texts = windows_of(model, options.text, options.windows)
    table: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        exact = {text: logits_of(model, rows) for text, rows in texts.items()}

        def measure(label: str, folder: Path, bits: float, seconds: float) -> None:
            figures = {text: compared(exact[text], logits_of(folder, rows), rows) for text, rows in texts.items()}
            table[label] = {"bits": bits, "seconds": seconds, "texts": figures}
            cells = "   ".join(
                f"{f['increase']:+6.2f} % ±{f['half']:4.2f}  KL {1000 * f['kl']:6.2f}e-3  {100 * f['top1']:5.1f} %"
                for f in figures.values()
            )
            print(f"{label:<24} {bits:>5.2f} bits  {cells}  {seconds:6.1f} s", flush=True)

        print(" " * 38 + "   ".join(f"{text:<42}" for text in texts))
        if options.llama_python:
            work = [options.llama_python, str(Path(__file__).with_name("decode.py")), "--job", "gguf"]
            subprocess.run([*work, str(model), str(place / "gguf")], check=True)
            for name in FORMATS:
                began = time.perf_counter()
                job = [options.llama_python, __file__, "-m", "-", "--job", model, place / "gguf" / f"{name}.gguf"]
                back = subprocess.run([*map(str, job), str(place / name)], check=True, capture_output=True, text=True)
                measure(f"llama.cpp {name}", place / name, json.loads(back.stdout), time.perf_counter() - began)
        for label in options.ways:
            began = time.perf_counter()
            config = ExportConfig(check=False, calibration=options.calibration, **WAYS[label])
            report: Any = list(export(model, place / label, config))[-1]
            measure(label, place / label, report.bits_per_weight, time.perf_counter() - began)
    below = []
    for label, (percent, bits) in BARS.items():
        if label in table:
            row = table[label]
            below += [label for figures in row["texts"].values() if figures["increase"] > percent]
            below += [label] if bits is not None and row["bits"] > bits else []
            peer = table.get("llama.cpp Q4_K_M") if bits is not None else None
            for text, figures in row["texts"].items() if peer else ():
                assert peer is not None
                worse = figures["increase"] > peer["texts"][text]["increase"]
                below += [f"{label} beside Q4_K_M on {text}"] if worse else []
    print(json.dumps({"benchmark": "quantization", "rows": table, "below": sorted(set(below)), "ok": not below}))
    sys.exit(1 if below else 0)


if __name__ == "__main__":
    main()
