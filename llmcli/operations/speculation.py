"""Speculation for a model that is open: checks that guesses can change nothing, and opens what makes them."""

from __future__ import annotations

from pathlib import Path

from llmcli import config as configs
from llmcli.config import SpeculationConfig
from llmcli.data.tokenizer import TextTokenizer, load_tokenizer
from llmcli.errors import UsageError
from llmcli.files.artefacts import is_onnx, resolve_model
from llmcli.runtime.session import Session
from llmcli.runtime.speculation import DraftModel, Lookup, Speculation


def check_speculation(config: SpeculationConfig, tokenizer: TextTokenizer) -> Path | None:
    """The draft model's folder, before any weights are read. Raises UsageError for one of another tokenizer."""
    configs.check(config)
    if config.draft_model is None:
        return None
    if config.lookup:
        raise UsageError("guesses come from one place: give one of --lookup and --draft-model")
    folder = resolve_model(config.draft_model)
    if load_tokenizer(folder).hash != tokenizer.hash:
        raise UsageError("has another tokenizer than the model, so its tokens mean other texts", where=str(folder))
    return folder


def open_speculation(
    config: SpeculationConfig,
    session: Session,
    draft: Path | None,
    *,
    device: str = "auto",
    threads: int | None = None,
    fast: bool = False,
) -> Speculation | None:
    """What decodes with guesses; None: nobody asked for it. `draft`: as `check_speculation` gave it.

    Raises UsageError where a run of several tokens gives other logits than single steps, unless `fast` allows it: then
    texts may differ, there and where rounding decides.
    """
    if not config.lookup and draft is None:
        return None
    if session.run_error is None and not fast:
        raise UsageError(
            "in this int8 folder the tokens of a run share a scale, so guesses would change the text; export the model "
            "anew, or allow it: --fast",
            where="--lookup" if config.lookup else "--draft-model",
        )
    if draft is None:
        return Speculation(Lookup(), exact=not fast)
    from llmcli.runtime.open import open_session

    opened = open_session(draft, device="cpu" if is_onnx(draft) else device, threads=threads)
    return Speculation(DraftModel(opened), exact=not fast)
