"""Constraints as a user gives them: read from files and settings, then made for a tokenizer.

Invariant: what is wrong with a schema, expression or grammar is told before the first token is generated.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path

from llmcli.config import ConstraintConfig
from llmcli.data.tokenizer import TextTokenizer
from llmcli.errors import ConfigError, DataError, from_os_error
from llmcli.runtime.constraint import Grammar, Vocabulary


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a text must be, its files read."""

    kind: str
    text: str | tuple[str, ...]
    where: str


def read_constraint(config: ConstraintConfig) -> Constraint | None:
    """The constraint that is asked for, if any. Raises ConfigError for two, and for JSON that is none."""
    given = {name: value for name, value in dataclasses.asdict(config).items() if value not in (None, ())}
    if not given:
        return None
    flags = ["--" + name.replace("_", "-") for name in given]
    if len(flags) > 1:
        raise ConfigError(f"give one of {' and '.join(flags)}", where=flags[0])
    (name,), (flag,) = given, flags
    if config.choice:
        if "" in config.choice:
            raise ConfigError("a choice must not be empty", where=flag)
        return Constraint("choice", config.choice, flag)
    value = str(given[name])
    if name == "regex":
        if not value:
            raise ConfigError("the expression must not be empty", where=flag)
        return Constraint("regex", value, flag)
    if name == "grammar":
        return Constraint("grammar", _read(value), value)
    inline = value.lstrip()[:1] == "{" or value.strip() in ("true", "false")
    where = flag if inline else value
    text = value if inline else _read(value)
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"is not valid JSON: {error.msg}", where=f"{where}:{error.lineno}:{error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("is not valid JSON", where=where) from error
    if not isinstance(schema, dict | bool):
        raise ConfigError("is not a JSON schema, which is an object", where=where)
    return Constraint("json-schema", text, where)


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise from_os_error(error, path) from error
    except UnicodeDecodeError as error:
        raise DataError(f"is not valid UTF-8 (byte {error.start})", where=path) from error


class Constrainer:
    """Makes grammars for a tokenizer, whose vocabulary is prepared when the first one is asked for."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self._vocabularies: dict[frozenset[int], Vocabulary] = {}

    def grammar(self, constraint: Constraint, ends: Collection[int]) -> Grammar:
        """The grammar of a constraint. Raises ConfigError for one that is wrong."""
        table = self.tokenizer.bytes_table
        if not table.exact:
            raise DataError(
                "its tokens cannot be told apart as bytes, which constrained output needs",
                where=self.tokenizer.files.where,
            )
        key = frozenset(ends)
        if key not in self._vocabularies:
            self._vocabularies[key] = Vocabulary(table.table, table.special, key)
        return Grammar(self._vocabularies[key], constraint.kind, constraint.text, where=constraint.where)
