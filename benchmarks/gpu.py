"""Decoding on a GPU: tokens/s of one row after 128 tokens, and what share of the memory's copy bandwidth that reads.

Models of random weights in the shape of TinyLlama (1.1 B) and Llama 2 (6.7 B) are made on the GPU, in bf16, int8 and
int4, and decode through the session that `generate --device cuda` uses. Bytes a token are those of the weights that a
step reads, and of the keys and values. `--products` times the quantized products by themselves, beside torch's own.
Without a CUDA device it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder, LlamaModel, rope_frequencies
from llmcli.models.ops import cuda_kernels
from llmcli.models.quantized import BITS, GROUP, QuantizedLinear, fuse, quantize
from llmcli.runtime.torch_session import TorchSession

PROMPT, NEW = 128, 128
BARS = {"bf16": 0.60, "int8": 0.60, "int4": 0.50}
SHAPES = {  # hidden size, blocks, heads, key/value heads, feed-forward size
    "1b": (2048, 22, 32, 4, 5632),
    "7b": (4096, 32, 32, 32, 11008),
}
PRODUCTS = ((2560, 2048), (2048, 2048), (11264, 2048), (12288, 4096), (4096, 4096), (22016, 4096))


def random_model(size: str) -> Decoder:
    """A model of drawn bf16 weights, made on the GPU."""
    hidden, layers, heads, narrow, inner = SHAPES[size]
    config = DecoderConfig(
        model_type="llama",
        vocab_size=32_000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=narrow,
        head_dim=hidden // heads,
        intermediate_size=inner,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Decoder(config).to(torch.bfloat16)
    model.to_empty(device="cuda")
    body = model.body
    assert isinstance(body, LlamaModel)
    body.frequencies = rope_frequencies(config).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0.0, parameter.size(-1) ** -0.5, generator=generator)
    return fuse(model.eval().requires_grad_(False))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying 4 GB on the GPU; the best of ten."""
    source = torch.ones(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = min(_milliseconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.nbytes / best * 1e3


def _milliseconds(run: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def decoding(session: TorchSession) -> float:
    """Tokens/s of one row after a prompt, logits brought to the processor for each."""
    chosen = np.random.default_rng(0)
    session.start([chosen.integers(0, session.vocab_size, PROMPT).tolist()])
    fed = chosen.integers(0, session.vocab_size, (NEW, 1, 1))
    began = time.perf_counter()
    for ids in fed:
        session.feed(ids)
    return NEW / (time.perf_counter() - began)


def step_bytes(model: Decoder) -> int:
    """That a step reads: weights, and keys and values of what is held on average."""
    config = model.config
    held = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.embedding.itemsize
    return model.step_bytes() + held * (PROMPT + NEW // 2)


def products(outputs: int, inputs: int, bandwidth: float) -> None:
    """Times products of one row with weights of each kind, and torch's own int4 kernel for the same shape."""
    kernels = cuda_kernels()
    x = torch.randn(1, inputs, device="cuda", dtype=torch.bfloat16)
    # So many matrices that the processor's cache holds none of them from one round to the next.
    count = max(2, (1 << 28) // (outputs * inputs))
    weights = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    timed = {"bf16": ([partial(torch.nn.functional.linear, x, weight) for weight in weights], weights[0].nbytes)}
    for kind, bits in BITS.items() if kernels is not None else ():
        made = [QuantizedLinear(weight, None, bits, "cuda") for weight in weights]
        calls = [partial(kernels.product, x, each.codes, each.scales, None, bits, GROUP) for each in made]
        timed[kind] = (calls, made[0].codes.nbytes + made[0].scales.nbytes)
    scales = torch.ones(inputs // GROUP, outputs, 2, device="cuda", dtype=torch.bfloat16)
    codes = [torch.randint(0, 255, (outputs, inputs // 2), device="cuda", dtype=torch.uint8) for _ in weights]
    tiny = [torch.ops.aten._convert_weight_to_int4pack(each, 8) for each in codes]
    calls = [partial(torch.ops.aten._weight_int4pack_mm, x, each, GROUP, scales) for each in tiny]
    timed["tinygemm"] = (calls, codes[0].nbytes + scales.nbytes)
    for name, (runs, size) in timed.items():
        for run in runs:
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # what it costs to start a kernel from Python is not what is asked for
            for run in runs:
                run()
        graph.replay()
        micro = 1e3 * statistics.median(_milliseconds(graph.replay) for _ in range(10)) / len(runs)
        print(f"{outputs:>8} {inputs:>7} {name:<10} {micro:>8.1f} {size / micro * 1e6 / bandwidth:>7.0%}", flush=True)


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 below a bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1b,7b", help="of 1b, 7b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--products", action="store_true", help="time the products by themselves too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: there is no CUDA device")
        print(json.dumps({"benchmark": "gpu", "skipped": "there is no CUDA device", "ok": True}))
        return
    bandwidth, results = copy_bandwidth(), []
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}: a copy reads and writes {bandwidth / 1e9:,.0f} GB/s")
    head = f"{'model':<6} {'weights':<8} {'GB/token':>9} {'tokens/s':>9} {'spread':>7}"
    print(f"{head} {'GB/s':>7} {'of copy':>8} {'bar':>5}")
    for size in options.sizes.split(","):
        for kind, bar in BARS.items():
            model = random_model(size)
            if kind in BITS:
                if cuda_kernels() is None:
                    print(f"{size:<6} {kind:<8} skipped: triton does not run here")
                    continue
                model = quantize(model, BITS[kind], "cuda")
            session = TorchSession(model)
            speeds = sorted(decoding(session) for _ in range(options.rounds + 1))[1:]  # the slowest made ready
            speed, read = statistics.median(speeds), step_bytes(model)
            share = speed * read / bandwidth
            spread = (speeds[-1] - speeds[0]) / speed
            print(
                f"{size:<6} {kind:<8} {read / 1e9:>9.3f} {speed:>9.1f} {spread:>7.1%} {speed * read / 1e9:>7.0f} "
                f"{share:>8.1%} {bar:>5.2f}",
                flush=True,
            )
            results.append({"model": size, "weights": kind, "bytes": read, "tokens_per_second": speed, "share": share})
            results[-1]["bar"] = bar
            session.close()
            del session, model
            torch.cuda.empty_cache()
    if options.products:
        print(f"\n{'outputs':>8} {'inputs':>7} {'product':<10} {'us':>8} {'of copy':>8}")
        for shape in PRODUCTS:
            products(*shape, bandwidth)
    ok = all(float(str(item["share"])) >= float(str(item["bar"])) for item in results)
    facts = {"benchmark": "gpu", "device": torch.cuda.get_device_name(), "copy_bandwidth": bandwidth}
    print(json.dumps({**facts, "runs": results, "ok": ok}))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
