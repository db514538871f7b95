"""The text that every Python brings: the topics of its help, the docstrings of its standard library, and what its
functions do.

Invariant: nothing is imported or run to get at it; docstrings are read from the source.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo")
)
_SHORTEST = 40  # characters; what is shorter says nothing
_LONGEST = 120  # characters of a signature, and of a sentence
_SENTENCE = re.compile(r"[A-Z][^.]*[a-z)]\.(?=\s|$)")


def help_topics() -> Iterator[str]:
    """The topics of `help()`, in the order of their names."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip() + "\n"


def module_docstrings() -> Iterator[str]:
    """A text a module of the standard library: the docstrings of the module, its classes and its functions."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT & set(path.relative_to(root).parts):
            continue
        tree = _parsed(path)
        if tree is None:
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node, clean=True) for node in ast.walk(tree) if isinstance(node, kinds))
        kept = [textwrap.dedent(text).strip() for text in found if text and len(text) >= _SHORTEST]
        if kept:
            yield "\n\n".join(kept) + "\n"


def function_pairs() -> Iterator[tuple[str, str]]:
    """Functions of the standard library's modules: how each is called, and the first sentence of its docstring."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        tree = _parsed(path)
        for node in tree.body if tree is not None else ():
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            told = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            sentence = _SENTENCE.match(told if told.endswith(".") else f"{told}.")
            signature = f"{path.stem}.{node.name}({ast.unparse(node.args)})"
            if sentence is not None and max(len(sentence[0]), len(signature)) <= _LONGEST:
                yield signature, sentence[0]


def _parsed(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in the standard library's own strings
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def python_texts() -> Iterator[str]:
    """All of it, a document each."""
    yield from help_topics()
    yield from module_docstrings()
