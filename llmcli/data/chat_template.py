"""Chat templates: messages to text by the model's own Jinja template. The one place that renders.

Invariant: a template comes from a stranger, so it runs in a child process that may neither write a file nor start a
process, and that the system kills beyond 2 s of work or 256 MB. Jinja's sandbox bounds names, not work (RELIABILITY
1.6): nested ranges, 2 ** 40 characters by doubling, `center(10 ** 10)`; no list of such things is ever whole.

What a template sees is what transformers shows it (`_compile_jinja_template` and `render_jinja_template` in
transformers/utils/chat_template_utils.py), so the text is the same, byte for byte.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcli.errors import DataError, from_os_error

if TYPE_CHECKING:
    from llmcli.data.tokenizer import TextTokenizer

SECONDS, MEGABYTES = 2.0, 256
_LONGEST = 1 << 20  # characters of a template; published ones have at most about 30,000
_LONGEST_TEXT = 1 << 25  # characters that it may make
_PATIENCE = 60.0  # seconds of waiting for a child that works 2 at most; a busy machine may not let it
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from llmcli.data.chat_template import serve; serve()"

Message = Mapping[str, Any]


class ChatTemplate:
    """A template at work. `variables`: what it sees beside the messages (`bos_token`, `eos_token`, ...)."""

    def __init__(self, text: str, variables: Mapping[str, Any] | None = None, where: str = "the chat template") -> None:
        if len(text) > _LONGEST:
            raise DataError(f"has {len(text):,} characters; a chat template has at most {_LONGEST:,}", where=where)
        self.text, self.variables, self.where = text, dict(variables or {}), where
        self._child: subprocess.Popen[bytes] | None = None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: Sequence[Any] | None = None
    ) -> str:
        """The conversation as text, up to where the answer begins.

        Raises DataError for a template that is wrong, that refuses the conversation, or that works beyond its limits.
        """
        return self.render_parts(messages, [(len(messages), add_generation_prompt)], tools=tools)[0]

    def render_parts(
        self, messages: Sequence[Message], parts: Sequence[tuple[int, bool]], *, tools: Sequence[Any] | None = None
    ) -> list[str]:
        """For each (count, add_generation_prompt) the first messages as text, all in one turn of the child."""
        asked = {
            "template": self.text,
            "messages": [_with_reasoning(message) for message in messages],
            "parts": list(parts),
            "variables": {"tools": None if tools is None else list(tools), "documents": None, **self.variables},
        }
        answer = self._ask(json.dumps(asked).encode("ascii") + b"\n")
        if "texts" in answer:
            return [str(text) for text in answer["texts"]]
        line = answer.get("line")
        raise DataError(str(answer.get("error")), where=f"{self.where}:{line}" if line else self.where)

    def _ask(self, request: bytes) -> dict[str, Any]:
        """A request to the child and its answer. After a child that was killed the next call starts another."""
        child = self._child = self._child or _start()
        assert child.stdin is not None
        assert child.stdout is not None
        answer = bytearray()
        try:
            child.stdin.write(request)
            child.stdin.flush()
            deadline = time.monotonic() + _PATIENCE
            while not answer.endswith(b"\n"):
                ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
                piece = child.stdout.read1(1 << 20) if ready else b""  # type: ignore[attr-defined]
                if not piece:
                    break
                answer += piece
        except BrokenPipeError:
            pass
        except BaseException:
            self.close()
            raise
        if answer.endswith(b"\n"):
            return dict(json.loads(answer))
        self.close()
        return {"error": f"it works without end: stopped after {SECONDS:g} s, or {MEGABYTES} MB"}

    def close(self) -> None:
        """Ends the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            with contextlib.suppress(BrokenPipeError):
                child.communicate()

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_template(tokenizer: TextTokenizer, file: str | Path | None = None) -> ChatTemplate:
    """The template of `file`, else the one that the tokenizer's files bring.

    Raises DataError where there is none, naming the way out.
    """
    text, where = tokenizer.chat_template, f"the chat template of {tokenizer.files.where}"
    if file is not None:
        where = str(file)
        try:
            text = Path(file).read_text("utf-8")
        except OSError as error:
            raise from_os_error(error, file) from error
        except UnicodeDecodeError as error:
            raise DataError(f"is not valid UTF-8 (byte {error.start})", where=where) from error
    if text is None:
        raise DataError(
            "has no chat template, so it cannot tell who speaks; --template FILE gives one (Jinja)",
            where=tokenizer.files.where,
        )
    return ChatTemplate(text, _token_names(tokenizer), where)


def _token_names(tokenizer: TextTokenizer) -> dict[str, Any]:
    """The special tokens by the names that tokenizer_config.json gives them: `bos_token` and its like."""
    found: dict[str, Any] = {}
    for name, value in tokenizer.config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    return {
        f"{role}_token": tokenizer.token(identity) for role, identity in roles.items() if identity is not None
    } | found


def _start() -> subprocess.Popen[bytes]:
    words = [sys.executable, "-I", "-c", _CHILD, *sys.path]
    # A group of its own: Ctrl-C in the terminal is for the conversation, not for the child.
    return subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _with_reasoning(message: Message) -> dict[str, Any]:
    """A message whose reasoning stands under the names that templates read."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


# ----------------------------------------------------------------------------------------------------------------
# In the child


def serve() -> None:
    """Renders what stands on stdin, a JSON object a line, to stdout."""
    import signal

    _limit()
    compiled: dict[str, Any] = {}
    while line := sys.stdin.buffer.readline():
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process, whatever it is at
        try:
            answer = _render(json.loads(line), compiled)
        except MemoryError:
            answer = {"error": f"it works without end: stopped after {SECONDS:g} s, or {MEGABYTES} MB"}
        except RecursionError:
            answer = {"error": "it is nested too deeply, or calls itself without end"}
        raw = json.dumps(answer).encode("ascii")
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(raw + b"\n")
        sys.stdout.buffer.flush()


def _limit() -> None:
    """What the process may take; files and processes: none, should a template find a way out of Jinja's sandbox."""
    import resource

    size = MEGABYTES << 20
    kinds = {"RLIMIT_AS": 4 * size, "RLIMIT_DATA": size, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
    for name, limit in kinds.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not every system has every limit
            resource.setrlimit(getattr(resource, name), (limit, limit))


def _render(asked: dict[str, Any], compiled: dict[str, Any]) -> dict[str, Any]:
    """The text of a request, or what is wrong and where."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        text = asked["template"]
        if text not in compiled:
            compiled[text] = _environment().from_string(text)
        texts, length = [], 0
        for count, asking in asked["parts"]:
            own = {"messages": asked["messages"][:count], "add_generation_prompt": asking}
            texts.append(compiled[text].render(own | asked["variables"]))
            length += len(texts[-1])
            if length > _LONGEST_TEXT:
                return {"error": f"makes a text of more than {_LONGEST_TEXT:,} characters"}
        return {"texts": texts}
    except TemplateSyntaxError as error:
        return {"error": f"is not a Jinja template: {_line(error.message)}", "line": error.lineno}
    except TemplateError as error:
        return {"error": f"refuses this conversation: {_line(error.message)}"}
    except (RecursionError, MemoryError):
        raise
    except Exception as error:
        return {"error": f"fails on this conversation: {type(error).__name__}: {_line(str(error))}"}


def _line(text: str | None) -> str:
    return " ".join((text or "no reason is given").split())[:500]


def _environment() -> Any:
    """Jinja's sandbox, with what transformers puts into it."""
    import jinja2
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; of no effect on the text."""

        tags = {"generation"}  # noqa: RUF012  (Jinja's own name)

        def parse(self, parser: Any) -> Any:
            """Its body, called as it stands."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    class Dict:
        """`dict` without the attributes of a class."""

        def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
            return dict(*values, **named)

        def fromkeys(self, *values: Any) -> dict[Any, Any]:
            """As of dict."""
            return dict.fromkeys(*values)

    class Names(Namespace):
        """A namespace without underscored names."""

        def __init__(*values: Any, **named: Any) -> None:  # a namespace may have an attribute `self`
            own, attributes = values[0], dict(*values[1:], **named)
            for name in attributes:
                refuse(name)
            Namespace.__init__(own, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse(name)
            super().__setitem__(name, value)

    def refuse(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"the name {name!r} begins with an underscore")

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=Names)
    return made
