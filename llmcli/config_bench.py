"""Settings of `bench`; `llmcli.config` gives them out with the others."""

from __future__ import annotations

import dataclasses

from llmcli.settings import setting


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """How a model's speed is measured."""

    prompt_tokens: int = setting(128, "Tokens of the prompt that is read.", group="Measurement", minimum=1)
    new_tokens: int = setting(64, "Tokens that are decoded after it.", group="Measurement", minimum=1)
    batch_size: tuple[int, ...] = setting(
        (1,), "Rows at once; given again for each.", group="Measurement", minimum=1, maximum=4096
    )
    rounds: int = setting(
        5, "Of each measurement; one more goes first.", group="Measurement", minimum=1, maximum=10_000
    )
    device: str = setting("auto", "Where to run.", group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    quantize: str | None = setting(
        None, "Round the weights as they are read (not of ONNX folders).", group="Machine", choices=("int8", "int4")
    )
    threads: int | None = setting(
        None, "CPU threads (default: the cores this process may use).", group="Machine", minimum=1, maximum=1024
    )
