"""The combinations of settings that a sweep tries, read from NAME=VALUE,VALUE and checked as the settings check them.

Invariant: every value of every combination is sound before the first trial begins.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from llmcli import settings as configs
from llmcli.config_finetune import LabelledConfig, LoraConfig, SweepConfig
from llmcli.errors import ConfigError
from llmcli.operations.finetune_settings import settle
from llmcli.training.machine import Machine

_MEASURE = ("val_split", "validation", "allow_overlap", "seed", "max_length", "on_long")  # what is validated on
_LOSS = ("beta", "label_smoothing", "class_weights", "multi_label")  # what the loss is: trials' losses are unlike then
_LONGEST_NAME = 100


@dataclasses.dataclass(frozen=True)
class Combination:
    """A value of each setting that is swept; `settings`: all settings, with these in place."""

    name: str
    values: Mapping[str, Any]
    settings: tuple[Any, ...]


def combinations(asked: SweepConfig, settings: Sequence[Any], *, apart: bool = False) -> list[Combination]:
    """Every combination, the last setting's values changing fastest. `settings`: FinetuneConfig, LoraConfig and so on.

    `apart`: what is validated on has a file of its own, which no seed draws.
    Raises ConfigError for a setting that is not known (naming the nearest), or that does not take a value.
    """
    known = {
        field.name: (each, details)
        for each in settings
        if not isinstance(each, LabelledConfig | SweepConfig)
        for field, details in configs.settings_of(type(each))
    }
    aliases = {alias[2:].replace("-", "_"): name for name, (_, found) in known.items() for alias in found.aliases}
    tried: dict[str, list[Any]] = {}
    for item in asked.sweep:
        name, equals, texts = item.partition("=")
        name = name.strip().replace("-", "_")
        name = aliases.get(name, name)
        if not equals:
            raise ConfigError(f"must be NAME=VALUE,VALUE; is {item!r}", where="sweep")
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}{configs.nearest(name, known)}", where="sweep")
        if name in _MEASURE and not (name == "seed" and apart):
            raise ConfigError(f"{name} decides what is validated on, so trials could not be compared", where="sweep")
        if name in tried:
            raise ConfigError(f"{name} is given twice; its values belong in one list", where="sweep")
        owner = known[name][0]
        tried[name] = list(dict.fromkeys(_value(owner, name, text.strip()) for text in texts.split(",")))
    if not tried:
        raise ConfigError("names no setting to try values of", where="sweep")
    found: list[Combination] = []
    for values in itertools.product(*tried.values()):
        chosen = dict(zip(tried, values, strict=True))
        made = tuple(
            dataclasses.replace(each, **{name: value for name, value in chosen.items() if known[name][0] is each})
            for each in settings
            if not isinstance(each, SweepConfig)
        )
        lora = next((each for each in made if isinstance(each, LoraConfig)), LoraConfig())
        settle(made[0], lora, Machine("cpu", "float32", False, 1), 1)  # settings that contradict each other
        found.append(Combination(_name_of(chosen, len(found)), chosen, made))
    return found


def change_the_loss(found: Sequence[Combination]) -> bool:
    """Whether the combinations differ in what the loss is, so that it does not tell the better one."""
    return any(name in _LOSS and len({each.values[name] for each in found}) > 1 for name in found[0].values)


def _value(owner: Any, name: str, text: str) -> Any:
    kind, _, many = configs.scalar_type(get_type_hints(type(owner))[name])
    if many:
        raise ConfigError(f"{name} holds several values, and cannot be swept", where="sweep")
    value: Any = text
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"must be true or false, is {text!r}", where=name)
        value = text == "true"
    elif kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            kinds = {int: "a whole number", float: "a number"}
            raise ConfigError(f"must be {kinds[kind]}, is {text!r}", where=name) from None
    configs.check(dataclasses.replace(owner, **{name: value}))
    return value


def _name_of(values: Mapping[str, Any], number: int) -> str:
    """A folder's name."""
    words = [f"{name}={f'{value:g}' if isinstance(value, float) else value}" for name, value in values.items()]
    whole = re.sub(r"[^A-Za-z0-9=.,_+-]", "_", ",".join(words))
    sound = len(whole) <= _LONGEST_NAME and whole == ",".join(words)
    return whole if sound else f"{number + 1:03d},{whole[:_LONGEST_NAME]}"
