"""Options: Click options made from config dataclasses, the shared flags, and the config file.

Precedence: a flag beats `LLMCLI_<COMMAND>_<OPTION>` beats the file of `-c/--config` beats the default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast, get_type_hints

import click

from llmcli import settings as configs
from llmcli.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass
class Shared:
    """What the flags that every command has were set to."""

    json: bool = False
    quiet: bool = False
    verbose: int = 0


def _shared(context: click.Context) -> Shared:
    root = context.find_root()
    if not isinstance(root.obj, Shared):
        root.obj = Shared()
    return root.obj


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    if value:
        setattr(_shared(context), str(parameter.name), value)
    return value


HELP = {"help_option_names": ["-h", "--help"]}  # of each command by itself, so that it has both wherever it is called


class GroupedCommand(click.Command):
    """A command whose help lists its options under the headings of their settings, and its example last."""

    def __init__(self, *arguments: Any, **details: Any) -> None:
        super().__init__(*arguments, **{**details, "context_settings": {**HELP, **details.get("context_settings", {})}})

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "General"), []).append(record)
        general = sections.pop("General", [])
        for name, rows in [*sections.items(), ("General", general)]:
            if rows:
                with formatter.section(name):
                    formatter.write_dl(rows)


class SectionOption(click.Option):
    """An option that knows under which heading it is listed."""

    def __init__(self, *arguments: Any, section: str = "Options", **details: Any) -> None:
        super().__init__(*arguments, **details)
        self.section = section


def shared_options(function: F) -> F:
    """Adds --json, -q/--quiet and -v/--verbose: every command has them."""
    details: dict[str, Any] = {"cls": SectionOption, "section": "General", "expose_value": False, "callback": _remember}
    for decorate in (
        click.option("-v", "--verbose", count=True, help="Say more; twice: tracebacks.", **details),
        click.option("-q", "--quiet", is_flag=True, help="Say nothing but the result and errors.", **details),
        click.option("--json", is_flag=True, help="Write JSON (Lines) to stdout; errors as JSON to stderr.", **details),
    ):
        function = decorate(function)
    return function


def is_json() -> bool:
    """Whether the running command was asked for JSON."""
    return _shared(click.get_current_context()).json


def is_quiet() -> bool:
    """Whether the running command was asked to say nothing beside the result."""
    return _shared(click.get_current_context()).quiet


def verbosity() -> int:
    """How often -v was given."""
    return _shared(click.get_current_context()).verbose


def overwrite_option(function: F) -> F:
    """Adds --overwrite: what stands at the output's place is replaced whole."""
    return click.option("--overwrite", is_flag=True, help="Replace an output that exists, whole.")(function)


def adapter_option(function: F) -> F:
    """Adds --adapter; the command's `model`, or each of its `models`, then arrives with the adapter on it."""

    def call(*arguments: Any, adapter: str | None, **values: Any) -> Any:
        if adapter is not None:
            from llmcli.files.artefacts import AdaptedModel

            if "models" in values:
                values["models"] = [AdaptedModel(each, adapter) for each in values["models"]]
            else:
                values["model"] = AdaptedModel(values["model"], adapter)
        return function(*arguments, **values)

    call.__doc__, call.__name__ = function.__doc__, function.__name__
    call.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    text = "Adapter (LoRA, as PEFT keeps it), or a run that made one; it goes on MODEL."
    return cast(F, click.option("--adapter", metavar="DIR", help=text)(call))


def settings(*kinds: type) -> Callable[[F], F]:
    """Adds an option for each setting of the dataclasses; the command gets one object a class, checked.

    The keyword is the class's name in snake case: `PretrainConfig` arrives as `pretrain_config`. With the options comes
    `-c/--config FILE`, whose keys are the settings' names.
    """

    def decorate(function: F) -> F:
        def call(*arguments: Any, **values: Any) -> Any:
            for kind in kinds:
                names = [field.name for field, _ in configs.settings_of(kind)]
                taken = {name: values.pop(name) for name in names}
                built = kind(**{name: _from_click(value) for name, value in taken.items()})
                configs.check(built)
                values[_snake(kind.__name__)] = built
            return function(*arguments, **values)

        call.__doc__, call.__name__ = function.__doc__, function.__name__
        call.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
        for kind in reversed(kinds):
            hints = get_type_hints(kind)
            for field, details in reversed(configs.settings_of(kind)):
                option_of(field.name, hints[field.name], field.default, details)(call)
        return cast(F, _config_file_option(call))

    return decorate


def _from_click(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def option_of(name: str, annotation: Any, default: Any, details: configs.Setting) -> Callable[[F], F]:
    """The Click option of one setting."""
    kind, _optional, many = configs.scalar_type(annotation)
    flag = details.flag or "--" + name.replace("_", "-")
    common: dict[str, Any] = {"cls": SectionOption, "section": details.group, "help": details.help, "default": default}
    if details.metavar:
        common["metavar"] = details.metavar
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **common)
    chosen: Any = click.Choice(details.choices) if details.choices else kind
    shown = default is not None and default != "" and default != ()
    return click.option(flag, *details.aliases, name, type=chosen, multiple=many, show_default=shown, **common)


def setting_option(config: type, name: str, *, section: str) -> Callable[[F], F]:
    """The Click option of one setting of a dataclass, for a command that does not take them all."""
    field, details = next(pair for pair in configs.settings_of(config) if pair[0].name == name)
    hints = get_type_hints(config)
    return option_of(name, hints[name], field.default, dataclasses.replace(details, group=section))


def _config_file_option(function: Any) -> Any:
    return click.option(
        "-c",
        "--config",
        cls=SectionOption,
        section="General",
        type=click.Path(dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_fill_defaults,
        help="TOML file with settings; flags and LLMCLI_* variables beat it.",
    )(function)


def _fill_defaults(context: click.Context, _parameter: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    values = configs.read_toml(path)
    known = {parameter.name: parameter for parameter in context.command.params if parameter.name not in _NOT_IN_FILES}
    if "task" not in known:  # of a fine-tuning run: each task is a command
        task = values.pop("task", context.info_name)
        if task != context.info_name:
            raise ConfigError(f"holds the settings of finetune {task}", where=path)
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"unknown key {name!r}{configs.nearest(name, [str(key) for key in known])}", where=path)
        if isinstance(value, dict):
            raise ConfigError(f"{name!r} must be a value, not a table", where=path)
    context.default_map = {**(context.default_map or {}), **values}


_NOT_IN_FILES = ("config", "help", "verbose", "quiet", "json")


def prompt_text(words: Sequence[str], *, read_stdin: Callable[[], str], piped: bool) -> str | None:
    """Joins piped text and arguments, piped first; `-` means stdin. None when there is neither."""
    argument = " ".join(words)
    if argument == "-" or (piped and not words):
        return read_stdin()
    if not piped:
        return argument if words else None
    head = read_stdin()
    return head + argument if not head or head[-1].isspace() else f"{head}\n{argument}"
