"""Tiny fine-tuning runs: bases of random weights, sums to learn as a chat, and texts whose words tell their label."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from small_model import make_model
from small_tokenizer import make_tokenizer

from llmcli.config import FinetuneConfig
from llmcli.operations.finetune import finetune
from llmcli.training.loop import TrainingEvent

SETTINGS: dict[str, Any] = {
    "max_steps": 8,
    "batch_size": 4,
    "eval_every": 2,
    "save_every": 3,
    "learning_rate": 0.01,
    "device": "cpu",
    "precision": "float32",
    "threads": 1,
}


def tiny(**changes: Any) -> FinetuneConfig:
    """The settings of a run of 8 steps that validates at every second and saves at every third."""
    return FinetuneConfig(**{**SETTINGS, **changes})


def make_base(folder: Path, **changes: Any) -> Path:
    """A llama of random weights, its tokenizer beside it."""
    if not folder.with_name("tokenizer").is_dir():
        make_tokenizer(folder.with_name("tokenizer"))
    return make_model(folder, folder.with_name("tokenizer"), **{"context": 64, "scale": 0.2, **changes})


def sums(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Conversations, a line each."""
    drawn = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b = drawn.randint(1, 99), drawn.randint(1, 99)
        turns = [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": str(a + b)}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))
    return path


def reviews(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Texts with a label, tabs between."""
    drawn = random.Random(seed)
    lines = ["text\tlabel\n"]
    for number in range(count):
        word = drawn.choice(["good", "fine"] if number % 2 else ["bad", "poor"])
        lines.append(f"a {word} thing, number {drawn.randint(0, 9999)}\t{'pos' if number % 2 else 'neg'}\n")
    path.write_text("".join(lines))
    return path


def pairs(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Prompts with two answers: the right sum is the better one."""
    drawn = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b = drawn.randint(1, 99), drawn.randint(1, 99)
        lines.append(
            json.dumps({"prompt": f"{a}+{b}?", "chosen": f"{a + b}", "rejected": f"no idea {drawn.randint(1, 9)}"})
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def go(task: str, base: Path, data: Path | list[str], at: Path, *settings: Any, **details: Any) -> list[TrainingEvent]:
    """A whole run; its training events."""
    files = [str(data)] if isinstance(data, Path) else data
    config = details.pop("config", None) or tiny()
    found = list(finetune(task, base, files, at, config, *settings, **details))
    return [record for record in found if isinstance(record, TrainingEvent)]


def until_step(step: int, *arguments: Any, **details: Any) -> None:
    """A run that is asked to stop after a step, as a signal does."""
    task, base, data, at, *settings = arguments
    last = [0]
    config = details.pop("config", tiny())
    records = finetune(task, base, [str(data)], at, config, *settings, stopping=lambda: last[0] >= step, **details)
    for record in records:
        if isinstance(record, TrainingEvent):
            last[0] = record.step


def make_encoder(folder: Path, family: str = "bert", **changes: Any) -> Path:
    """An encoder of random weights and a tokenizer whose tokens are letters and a few words, framed as the family's."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    from llmcli.models.encoder_config import EncoderConfig
    from llmcli.models.encoder_folder import save_encoder
    from llmcli.models.encoder_heads import build_encoder

    roberta = family == "roberta"
    first, last, pad = ("<s>", "</s>", "<pad>") if roberta else ("[CLS]", "[SEP]", "[PAD]")
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = ["good", "fine", "bad", "poor", "thing", "number", "the", "sea", "is", "blue", "red", "which", "colour"]
    tokens = list(dict.fromkeys(["[UNK]", pad, first, last, *letters, *(f"##{each}" for each in letters), *words]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    between = f"{last}:0 {last}:0 $B:0 {last}:0" if roberta else f"{last}:0 $B:1 {last}:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {between}",
        special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])],
    )
    tokenizer.add_special_tokens([first, last, pad])
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad, "unk_token": "[UNK]"}))
    shape: dict[str, Any] = {
        "vocab_size": len(tokens),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "type_vocab_size": {"bert": 2, "roberta": 1, "distilbert": 0}[family],
        "pad_token_id": 1,
    }
    model = build_encoder(EncoderConfig(family, **{**shape, **changes}), "base", pooler=family == "bert")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    save_encoder(model, folder, special_ids={"bos_token_id": None, "eos_token_id": None, "pad_token_id": 1})
    return folder


def questions(path: Path, count: int = 24, seed: int = 0, *, silent: bool = True) -> Path:
    """Questions about the colour of things, as SQuAD 2.0 has them; some texts do not tell it if `silent`."""
    drawn = random.Random(seed)
    paragraphs = []
    for number in range(count):
        colour, other = drawn.sample(["blue", "red", "fine", "poor"], 2)
        told = not silent or number % 3 > 0
        context = f"the thing {drawn.randint(0, 999)} is {other}. " + (f"the sea is {colour}." if told else "the sea.")
        answers = [{"text": colour, "answer_start": context.rindex(colour)}] if told else []
        question = {"id": str(number), "question": "which colour is the sea", "answers": answers}
        paragraphs.append({"context": context, "qas": [question | ({"is_impossible": not told} if silent else {})]})
    path.write_text(json.dumps({"data": [{"title": "colours", "paragraphs": paragraphs}]}))
    return path
