"""The model that a pretraining run is made of: fresh, or with what another one has that fits (`--init`).

Invariant: what is taken over is told, and a model of which not even the embedding fits is refused.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import DataError
from llmcli.files.artefacts import read_json, resolve_model
from llmcli.files.tensors import weights_hash
from llmcli.models.config import DecoderConfig
from llmcli.models.decoder import Decoder
from llmcli.models.encoder import Encoder
from llmcli.models.encoder_config import EncoderConfig, is_encoder
from llmcli.models.encoder_folder import head_of, load_encoder, load_encoder_config
from llmcli.models.encoder_heads import build_encoder
from llmcli.models.folder import load_config, load_model
from llmcli.operations.pretrain_settings import Settled, Shape
from llmcli.training.takeover import taken_over


@dataclasses.dataclass(frozen=True)
class Base:
    """A model that a run begins from."""

    given: str
    folder: Path
    shape: Shape
    hash: str  # of its weights

    def load(self) -> Decoder | Encoder:
        """Its weights, with the head for hidden tokens where it has one."""
        if isinstance(self.shape, EncoderConfig):
            kind = "masked" if head_of(self.folder) == "masked" else "base"
            return load_encoder(self.folder, "cpu", torch.float32, kind=kind)
        return load_model(self.folder, "cpu", torch.float32)


def open_base(given: str) -> Base:
    """Looks at the model that a run begins from: a folder, or a run's result. Raises DataError where it is none."""
    folder = resolve_model(given, onnx=False)
    encoder = is_encoder(read_json(folder / "config.json"))
    shape: Shape = load_encoder_config(folder) if encoder else load_config(folder)
    return Base(given, folder, shape, weights_hash(folder))


def built(settled: Settled, tokenizer: TextTokenizer, base: Base | None) -> tuple[Decoder | Encoder, dict[str, str]]:
    """The model at its first step on its device, and what it took over, for people.

    Raises DataError where not even the embedding of the base fits.
    """
    shape, generator = settled.shape, torch.Generator().manual_seed(settled.config.seed)
    model: Decoder | Encoder
    if isinstance(shape, DecoderConfig):
        model = Decoder(shape)
    else:
        model = build_encoder(shape, "masked" if settled.objective.objective == "masked" else "base")
    model = model.init_weights(generator)
    facts = {}
    if base is not None:
        known = base.load()
        taken = taken_over(model, known, tokenizer, load_tokenizer(base.folder))
        if not taken.rows:
            wide = f"its embedding is {known.embedding.size(1)} wide, that of the run {model.embedding.size(1)}"
            told = wide if known.embedding.size(1) != model.embedding.size(1) else "it shares no token with the run"
            raise DataError(f"nothing of it can be taken over: {told}", where=base.given)
        facts["init"] = f"{base.given} ({known.config.model_type}): {taken}"
    model = model.to(torch.device(settled.machine.device))
    model.compute_dtype = settled.machine.dtype
    return model, facts
