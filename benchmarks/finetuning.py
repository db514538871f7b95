"""Fine-tuning speed: tokens/s of `llmcli finetune chat`, whole and with LoRA, beside transformers and peft, in one run.

Random weights of 15 M and 135 M parameters, on pairs of prompt and completion cut from the text that Python brings.
Both sides see rows of the same token ids, 16 a step in a random order, with fused AdamW, gradients clipped to 1 and
bfloat16; the peer is the loop of transformers' documentation, under autocast, its rows filled up to the longest of the
batch. Tokens that only fill up count for nobody. Each run is a process of its own; they alternate.

peft needs accelerate: name an interpreter that has both, with transformers, with --peer-python.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

BAR = 1.25
WARM_STEPS = 3  # not counted: first allocations
# layers, width, heads, key and value heads, inner width, vocabulary: those of decode.py
SHAPES = {"15m": (6, 288, 6, 6, 768, 32_000), "135m": (30, 576, 9, 3, 1536, 49_152)}
RATE, ROWS, RANK = 2e-4, 16, 16

PEER = """
import json, sys, time, numpy, torch
from transformers import AutoModelForCausalLM
folder, data, kind, steps, threads, size, rank, rate = sys.argv[1:9]
size = int(size)
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
if kind == "lora":
    from peft import LoraConfig, get_peft_model
    shape = LoraConfig(r=int(rank), lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, shape)
model.train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=float(rate), weight_decay=0.0, fused=True)
rows = [json.loads(line) for line in open(data)]
speeds = []
for step in range(int(steps)):
    batch = rows[step * size : (step + 1) * size]
    began = time.perf_counter()
    longest = max(len(row["ids"]) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, row in enumerate(batch):
        count = len(row["ids"])
        ids[place, :count], mask[place, :count] = torch.tensor(row["ids"]), 1
        labels[place, row["begin"] : count] = torch.tensor(row["ids"][row["begin"] :])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    speeds.append(int(mask.sum()) / (time.perf_counter() - began))
print(json.dumps(speeds))
"""


def pieces() -> Iterator[tuple[str, str]]:
    """Prompts of 100 to 500 characters and what follows them, 100 to 1,500 characters."""
    from llmcli.data.python_text import python_texts

    drawn = random.Random(0)
    for text in python_texts():
        begin = 0
        while begin + 600 < len(text):
            middle = begin + drawn.randint(100, 500)
            end = middle + int(min(1500, 100 * 15 ** drawn.random()))
            yield text[begin:middle], text[middle:end]
            begin = end


def written(folder: Path) -> tuple[Path, Path]:
    """The pairs as a file for llmcli, and a tokenizer of 8,192 tokens."""
    from llmcli.config import TextConfig, TokenizerConfig
    from llmcli.data.python_text import python_texts
    from llmcli.operations.tokenizer import train_tokenizer

    text, data = folder / "python.jsonl", folder / "pairs.jsonl"
    text.write_text("".join(json.dumps({"text": item}) + "\n" for item in python_texts()), "utf-8")
    for _ in train_tokenizer([str(text)], folder / "tokenizer", TextConfig(), TokenizerConfig(vocab_size=8192)):
        pass
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pieces()]
    random.Random(1).shuffle(lines)
    data.write_text("\n".join(lines) + "\n", "utf-8")
    return data, folder / "tokenizer"


def modelled(folder: Path, size: str, tokenizer: Path) -> Path:
    """A model folder of random weights; its vocabulary may be larger than the tokenizer's."""
    import torch

    from llmcli.data.tokenizer import load_tokenizer
    from llmcli.models.config import DecoderConfig
    from llmcli.models.decoder import Decoder
    from llmcli.models.folder import save_model

    layers, width, heads, groups, inner, vocabulary = SHAPES[size]
    config = DecoderConfig("llama", vocabulary, width, layers, heads, groups, width // heads, inner, 1024)
    place = folder / size
    place.mkdir()
    texts = load_tokenizer(tokenizer)
    special = {"bos_token_id": texts.bos_id, "eos_token_id": texts.eos_id, "pad_token_id": texts.pad_id}
    save_model(Decoder(config).init_weights(torch.Generator().manual_seed(0)), place, special_ids=special)
    texts.save(place)
    return place


def as_ids(data: Path, model: Path, path: Path, rows: int) -> None:
    """The ids that llmcli trains on, for the peer."""
    from llmcli.data.examples import CompletionExample
    from llmcli.data.tokenizer import load_tokenizer
    from llmcli.operations.task_chat import ChatTask

    tokenizer, lines = load_tokenizer(model), data.read_text("utf-8").splitlines()[:rows]
    task = ChatTask()
    pairs = [json.loads(line) for line in lines]
    examples = [CompletionExample(pair["prompt"], pair["completion"], where="") for pair in pairs]
    with path.open("w", encoding="utf-8") as file:
        for row in task.encoded(examples, task.tokenizer(tokenizer)):
            file.write(json.dumps({"ids": row.ids.tolist(), "begin": int(row.wanted.argmax())}) + "\n")


def ours(model: Path, data: Path, run: Path, kind: str, steps: int) -> list[float]:
    """Tokens/s of each step of the command."""
    words = [sys.executable, "-m", "llmcli", "finetune", "chat", str(model), str(data), "-o", str(run), "--overwrite"]
    words += ["--json", "--max-steps", str(steps), "--batch-size", str(ROWS), "--lr", str(RATE), "--val-split", "0"]
    words += ["--precision", "bfloat16", *(["--lora", "--lora-rank", str(RANK)] if kind == "lora" else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return [event["tokens_per_second"] for event in events if event["event"] == "step"]


def peer(python: str, model: Path, ids: Path, kind: str, steps: int, threads: int) -> list[float]:
    """Tokens/s of each step of transformers, with peft."""
    words = [python, "-c", PEER, str(model), str(ids), kind, *map(str, (steps, threads, ROWS, RANK, RATE))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measures, prints a table and one JSON line; exit 1 below the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--kinds", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--peer-python", help="interpreter that has transformers, peft and accelerate")
    options = parser.parse_args()
    from llmcli.data.cores import available_cores

    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data, tokenizer = written(folder)
        for size in options.sizes:
            model, ids = modelled(folder, size, tokenizer), folder / "ids.jsonl"
            as_ids(data, model, ids, options.steps * ROWS)
            for kind in options.kinds:
                speeds = found[f"{size} {kind}"] = {"llmcli": [], "peer": []}
                for _ in range(options.rounds):
                    steps = ours(model, data, folder / "run", kind, options.steps)
                    speeds["llmcli"].append(statistics.median(steps[WARM_STEPS:]))
                    if options.peer_python:
                        steps = peer(options.peer_python, model, ids, kind, options.steps, available_cores())
                        speeds["peer"].append(statistics.median(steps[WARM_STEPS:]))
    print(f"{'tokens/s, median (least to most)':<34} {'llmcli':>22} {'transformers':>22} {'ratio':>6}")
    ratios = {}
    for name, speeds in found.items():
        cells = [
            f"{statistics.median(each):,.0f} ({min(each):,.0f} to {max(each):,.0f})" if each else "left out"
            for each in speeds.values()
        ]
        pairs = list(zip(speeds["llmcli"], speeds["peer"], strict=False))
        ratios[name] = statistics.median(mine / theirs for mine, theirs in pairs) if pairs else None
        print(f"{name:<34} {cells[0]:>22} {cells[1]:>22} {ratios[name] or float('nan'):>6.2f}")
    if not options.peer_python:
        print("transformers was left out: name an interpreter that has it and peft with --peer-python")
    print(json.dumps({"benchmark": "finetuning", "tokens_per_second": found, "ratios": ratios, "bar": BAR}))
    sys.exit(1 if any(ratio is not None and ratio < BAR for ratio in ratios.values()) else 0)


if __name__ == "__main__":
    main()
