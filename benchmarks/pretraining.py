"""Pretraining speed: tokens/s of `llmcli pretrain` at 13.8 M parameters, beside litgpt, in one run.

6 layers, width 384, 6 heads, ffn 1,024, vocabulary 8,192, tied head; 16 x 256 tokens a step. Ours is the command as it
is, compiled, with Muon and with AdamW; litgpt is its model under bfloat16 autocast with fused AdamW, eager and
compiled (its best on a CPU). Configurations alternate, each in a process of its own; medians of the processes' medians.

litgpt pins other versions than llmcli: install it (`pip install torch==2.13.0 litgpt==0.5.13`) into an environment of
its own and name its interpreter with --peer-python. Without one it is left out, and the run says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BAR = 1.1
WARM_STEPS = 3  # not counted: compilation, first allocations

PEER = """
import sys, time, json, torch
from litgpt.model import GPT, Config
from litgpt.utils import chunked_cross_entropy
torch.set_num_threads(int(sys.argv[3]))
torch.manual_seed(0)
config = Config(name="bench", block_size=256, vocab_size=8192, padded_vocab_size=8192, n_layer=6, n_head=6, n_embd=384,
    n_query_groups=6, rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP", intermediate_size=1024)
model = GPT(config)
model.lm_head.weight = model.transformer.wte.weight
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
forward = torch.compile(model) if sys.argv[1] == "compile" else model
speeds = []
for _ in range(int(sys.argv[2])):
    began = time.perf_counter()
    ids = torch.randint(0, 8192, (16, 257))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(forward(ids[:, :-1]), ids[:, 1:], chunk_size=0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    speeds.append(4096 / (time.perf_counter() - began))
print(json.dumps(speeds))
"""

SHAPE = ["--layers", "6", "--hidden-size", "384", "--heads", "6", "--kv-heads", "6", "--ffn-size", "1024"]


def corpus(folder: Path) -> Path:
    """A corpus of the text that Python brings, vocabulary 8,192."""
    from llmcli.config import CorpusConfig, TextConfig, TokenizerConfig
    from llmcli.data.python_text import python_texts
    from llmcli.operations.prepare import prepare
    from llmcli.operations.tokenizer import train_tokenizer

    text = folder / "python.jsonl"
    text.write_text("".join(json.dumps({"text": item}) + "\n" for item in python_texts()), "utf-8")
    for _ in train_tokenizer([str(text)], folder / "tokenizer", TextConfig(), TokenizerConfig(vocab_size=8192)):
        pass
    for _ in prepare([str(text)], folder / "tokenizer", folder / "corpus", TextConfig(), CorpusConfig()):
        pass
    return folder / "corpus"


def ours(data: Path, run: Path, steps: int, extra: list[str]) -> list[float]:
    """Tokens/s of each step of the command."""
    words = [sys.executable, "-m", "llmcli", "pretrain", str(data), "-o", str(run), "--overwrite", "--json", *SHAPE]
    words += ["--context", "256", "--batch-size", "16", "--max-steps", str(steps), "--eval-every", "100000", *extra]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return [event["tokens_per_second"] for event in events if event["event"] == "step"]


def peer(python: str, mode: str, steps: int, threads: int) -> list[float]:
    """Tokens/s of each step of litgpt."""
    words = [python, "-c", PEER, mode, str(steps), str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 below the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--peer-python", help="interpreter that has litgpt")
    options = parser.parse_args()
    from llmcli.data.cores import available_cores

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = corpus(folder)
        jobs = {
            "llmcli muon, compiled": lambda: ours(data, folder / "run", options.steps, ["--compile", "on"]),
            "llmcli adamw, compiled": lambda: ours(
                data, folder / "run", options.steps, ["--compile", "on", "--optimizer", "adamw"]
            ),
            "llmcli muon, eager": lambda: ours(data, folder / "run", options.steps, ["--compile", "off"]),
        }
        if options.peer_python:
            for mode in ("compile", "eager"):
                jobs[f"litgpt bf16, {mode}"] = lambda mode=mode: peer(
                    options.peer_python, mode, options.steps, available_cores()
                )
        speeds: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(options.rounds):
            for name, job in jobs.items():
                speeds[name].append(statistics.median(job()[WARM_STEPS:]))
    base = statistics.median(speeds.get("litgpt bf16, compile", [float("nan")]))
    print(f"{'configuration':<24} {'tokens/s':>9} {'min':>7} {'max':>7} {'ratio':>6}")
    for name, found in speeds.items():
        middle = statistics.median(found)
        print(f"{name:<24} {middle:>9,.0f} {min(found):>7,.0f} {max(found):>7,.0f} {middle / base:>6.2f}")
    if not options.peer_python:
        print("litgpt was left out: name an interpreter that has it with --peer-python")
    ratio = statistics.median(speeds["llmcli muon, compiled"]) / base
    print(json.dumps({"benchmark": "pretraining", "tokens_per_second": speeds, "ratio": ratio, "bar": BAR}))
    sys.exit(1 if ratio < BAR else 0)


if __name__ == "__main__":
    main()
