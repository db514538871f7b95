"""Settings: frozen dataclasses whose fields carry help, range and flags. Standard library only.

One dataclass is the single source of a setting: the Click option, the Python signature, the check, and the line in
the resolved `config.toml` all come from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from llmcli.errors import ConfigError, DataError, from_os_error

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of a field beside its name, type and default."""

    help: str
    group: str = "Options"
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None  # an exclusive lower bound
    aliases: tuple[str, ...] = ()  # further flags, written out: "--lr"
    flag: str = ""  # the main flag where it is not the field's name
    metavar: str = ""


def setting(default: Any, help: str, **details: Any) -> Any:
    """A dataclass field with its `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **details)})


def settings_of(config: type) -> list[tuple[dataclasses.Field[Any], Setting]]:
    """The fields of a config dataclass that are settings, in order."""
    return [(field, field.metadata["setting"]) for field in dataclasses.fields(config) if "setting" in field.metadata]


def scalar_type(annotation: Any) -> tuple[type, bool, bool]:
    """(type, optional, many) of an annotation: `int | None` gives (int, True, False)."""
    arguments = get_args(annotation)
    if Ellipsis in arguments:
        return arguments[0], False, True
    kinds = [argument for argument in arguments if argument is not type(None)]
    if kinds:
        return kinds[0], type(None) in arguments, False
    return annotation, False, False


def check(config: Any) -> None:
    """Raises ConfigError for the first value that is of a wrong type, not among the choices, or out of range."""
    hints = get_type_hints(type(config))
    for field, details in settings_of(type(config)):
        value = getattr(config, field.name)
        kind, optional, many = scalar_type(hints[field.name])
        if value is None and optional:
            continue
        for item in value if many else (value,):
            _check_value(field.name, item, kind, details)


def _check_value(name: str, value: Any, kind: type, details: Setting) -> None:
    accepted: Any = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"must be {_type_name(kind)}, is {value!r}", where=name)
    if details.choices and value not in details.choices:
        raise ConfigError(f"must be one of {', '.join(details.choices)}; is {value!r}", where=name)
    if kind in (int, float):
        if value != value:
            raise ConfigError("must be a number, is NaN", where=name)
        if value in (float("inf"), float("-inf")):
            raise ConfigError("must be finite", where=name)
        found = f"is {value}" if isinstance(value, int) else f"is {value:g}"  # a whole number may be beyond any float
        if details.above is not None and value <= details.above:
            raise ConfigError(f"must be greater than {details.above:g}, {found}", where=name)
        if details.minimum is not None and value < details.minimum:
            raise ConfigError(f"must be at least {details.minimum:g}, {found}", where=name)
        if details.maximum is not None and value > details.maximum:
            raise ConfigError(f"must be at most {details.maximum:g}, {found}", where=name)


def _type_name(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(kind, kind.__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known key, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def from_mapping(config: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Builds and checks a config from a mapping. Raises ConfigError for an unknown key, naming the nearest."""
    known = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown key {name!r}{nearest(name, known)}", where=where or None)
    built = config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    check(built)
    return built


def read_toml(path: str | Path) -> dict[str, Any]:
    """Reads a TOML file. Raises DataError with the line and column of a syntax error."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise from_os_error(error, path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"is not valid TOML: {error}", where=str(path)) from error


def to_toml(values: Mapping[str, Any]) -> str:
    """Writes a flat mapping, with one level of tables, as TOML; None is left out, as TOML has none.

    A JSON string without escapes of non-ASCII characters is a TOML basic string (TOML 1.0, Strings), so json does it.
    """
    plain = [(key, value) for key, value in values.items() if not isinstance(value, Mapping)]
    lines = [f"{key} = {_toml_value(value)}" for key, value in plain if value is not None]
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{key}]", to_toml(value).rstrip("\n")]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
