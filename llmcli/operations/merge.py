"""`merge`: a base and an adapter to a model of its own.

Invariant: what is written gives what the base with the adapter gives, but for the rounding of the base's precision.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llmcli.data.tokenizer import load_tokenizer
from llmcli.files.artefacts import AdaptedModel, end_ids, find_model, read_json
from llmcli.files.atomic import refuse_existing, staged_folder
from llmcli.files.manifest import sha256_of, versions, write_manifest
from llmcli.files.tensors import weights_hash
from llmcli.models.adapter_folder import ADAPTER, is_classifier_adapter, load_adapted
from llmcli.operations.run_folder import WholeModel

_LABELS = ("architectures", "id2label", "label2id", "problem_type", "pad_token_id")


@dataclasses.dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written."""

    output: str
    base: str
    adapter: str
    parameters: int


def merge(base: str | Path, adapter: str | Path, output: str | Path, *, overwrite: bool = False) -> MergeReport:
    """Writes the merged model, in the base's precision, with the adapter's tokenizer where it brings one.

    Raises DataError for an adapter that was made for another base, and for an ONNX folder, whose weights are fixed.
    """
    place = find_model(AdaptedModel(base, adapter))
    target = Path(output)
    refuse_existing(target, overwrite=overwrite)
    assert place.adapter is not None
    labels = is_classifier_adapter(place.adapter)
    model = load_adapted(place.folder, place.adapter, kind="classifier" if labels else "model")
    said = read_json(place.adapter / "config.json") if labels and (place.adapter / "config.json").is_file() else {}
    facts = {name: said[name] for name in _LABELS if name in said}
    lineage = {
        "parent": weights_hash(place.folder),
        "adapter": sha256_of(place.adapter / ADAPTER),
        **versions(),
    }
    with staged_folder(target, overwrite=overwrite) as folder:
        whole = WholeModel(model, load_tokenizer(place.texts), facts, end_ids(place.texts))
        whole.write(folder)
        write_manifest(folder, lineage)
    count = sum(parameter.numel() for parameter in model.parameters())
    return MergeReport(str(output), str(base), str(adapter), count)
