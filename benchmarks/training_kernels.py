"""Choices inside training, each against its alternative, alternated in one run: attention, Muon's iteration, precision.

* attention, forward and backward, 16 x 6 heads x 256 x 64 in bfloat16: the probabilities kept, or the fused kernel,
  each compiled and as it is;
* Muon's orthogonalisation of 6 matrices of 1024 x 384: four quintics behind the tight bound of the spectral norm, or
  torch.optim.Muon's five of Jordan's coefficients behind Frobenius', with the range of singular values that comes out;
* a whole step of a small decoder under bfloat16 and under float32, for widths around the one where `auto` changes over.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from llmcli.data.cores import available_cores
from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.ops import CausalAttention
from llmcli.training.losses import head_loss
from llmcli.training.optimizer import orthogonalize

JORDAN = (3.4445, -4.775, 2.0315)


def alternated(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each job."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 2):  # two rounds to warm up
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if number >= 2:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def attention(rounds: int) -> dict[str, float]:
    """Forward and backward of causal attention."""
    parts = [torch.randn(16, 6, 256, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(16, 6, 256, 64, dtype=torch.bfloat16)

    def kept(*inputs: torch.Tensor) -> torch.Tensor:
        return CausalAttention.apply(*inputs, 1)

    def fused(*inputs: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*inputs, is_causal=True)

    ways = {"probabilities kept": kept, "fused kernel": fused}
    ways |= {f"{name}, compiled": torch.compile(way) for name, way in ways.items()}
    return alternated(
        {f"attention, {name}": lambda way=way: way(*parts).backward(gradient) for name, way in ways.items()}, rounds
    )


def five_of_jordan(stack: torch.Tensor) -> torch.Tensor:
    """torch.optim.Muon's iteration, on a stack."""
    a, b, c = JORDAN
    x = stack.mT if stack.size(1) > stack.size(2) else stack
    x = x / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def muon(rounds: int) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Seconds, and the least and greatest singular value that comes out."""
    torch.manual_seed(0)
    stack = torch.randn(6, 1024, 384).to(torch.bfloat16)
    ways = {"muon, four behind the tight bound": orthogonalize, "muon, five behind Frobenius'": five_of_jordan}
    seconds = alternated({name: lambda way=way: way(stack) for name, way in ways.items()}, rounds)
    values = {name: torch.linalg.svdvals(way(stack).float()) for name, way in ways.items()}
    return seconds, {name: (float(found.min()), float(found.max())) for name, found in values.items()}


def precision(rounds: int) -> dict[str, float]:
    """Forward and backward of 4 layers, 4,096 tokens, vocabulary 2,048."""
    found: dict[str, float] = {}
    for width in (32, 64, 128, 384):
        shape = DecoderConfig("qwen3", 2048, width, 4, width // 32, width // 32, 32, width * 8 // 3 // 32 * 32, 256)
        model = Decoder(shape).init_weights(torch.Generator().manual_seed(0))
        ids = torch.randint(0, 2048, (16, 257), generator=torch.Generator().manual_seed(1))

        def step(dtype: torch.dtype, model: Decoder = model, ids: torch.Tensor = ids) -> None:
            model.compute_dtype = dtype
            head_loss(model.hidden(ids[:, :-1]), model.head, ids[:, 1:], torch.tensor(1 / 4096)).backward()

        jobs = {
            f"step, width {width}, {name}": lambda dtype=dtype, step=step: step(dtype)
            for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
        }
        found |= alternated(jobs, max(3, rounds // 5))
    return found


def main() -> None:
    """Measures, prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(available_cores())
    seconds = attention(options.rounds)
    more, values = muon(options.rounds)
    seconds |= more | precision(options.rounds)
    for name, found in seconds.items():
        extra = f"   singular values {values[name][0]:.3f} to {values[name][1]:.3f}" if name in values else ""
        print(f"{name:<40} {1000 * found:>8.2f} ms{extra}")
    print(json.dumps({"benchmark": "training_kernels", "seconds": seconds, "singular_values": values}))


if __name__ == "__main__":
    main()
