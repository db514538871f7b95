"""The text that every Python brings: the topics of its help, and the docstrings of its standard library.

Invariant: nothing is imported or run to get at it; docstrings are read from the source.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo")
)
_SHORTEST = 40  # characters; what is shorter says nothing


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
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd escapes in the standard library's own strings
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node, clean=True) for node in ast.walk(tree) if isinstance(node, kinds))
        kept = [textwrap.dedent(text).strip() for text in found if text and len(text) >= _SHORTEST]
        if kept:
            yield "\n\n".join(kept) + "\n"


def python_texts() -> Iterator[str]:
    """All of it, a document each."""
    yield from help_topics()
    yield from module_docstrings()
