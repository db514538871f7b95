"""What config.json says of a classifier's labels. No torch: graphs are asked for labels too.

Invariant: labels stand in the order of their scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmcli.errors import ConfigError

SUFFIX = "ForSequenceClassification"


def labels_of(values: Mapping[str, Any], where: str) -> list[str]:
    """The labels that a config.json names, in the order of their scores. Raises ConfigError where it names none."""
    named = values.get("id2label")
    try:
        found = {int(index): label for index, label in named.items()}  # type: ignore[union-attr]
    except (AttributeError, ValueError, TypeError):
        raise ConfigError("id2label must name the labels by number", where=where) from None
    labels = [found.get(index) for index in range(len(found))]
    if not labels or any(not isinstance(label, str) for label in labels):
        raise ConfigError("id2label must name the labels from 0 on", where=where)
    return labels  # type: ignore[return-value]


def is_classifier(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a classifier."""
    names = values.get("architectures")
    return isinstance(names, list) and any(isinstance(name, str) and name.endswith(SUFFIX) for name in names)


def gives_several(values: Mapping[str, Any]) -> bool:
    """Whether a text may have any number of the labels."""
    return values.get("problem_type") == "multi_label_classification"
