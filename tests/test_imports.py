"""What may import what, who may write, and what is never called: read from the source, and from a running process."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmcli"
FILES = sorted(PACKAGE.rglob("*.py"))

# Rooms from the top down. An import may stay in its room or go down; what stands beside the rooms is below them.
ROOMS = {
    "cli": 4,
    "operations": 3,
    "training": 2,
    "onnx": 2,
    "runtime": 2,
    "models": 1,
    "data": 1,
    "files": 0,
    "config": -1,
    "config_bench": -1.5,
    "config_convert": -1.5,
    "config_embed": -1.5,
    "config_evaluate": -1.5,
    "config_export": -1.5,
    "config_finetune": -1.5,
    "config_generation": -1.5,
    "config_objective": -1.5,
    "settings": -2,
    "errors": -3,
}
BARRED_FROM_HELP = (
    "torch",
    "numpy",
    "onnxruntime",
    "onnx_ir",
    "rich",
    "tokenizers",
    "tiktoken",
    "safetensors",
    "jinja2",
)
MOST_LINES = 400

# Writing. `files/` writes to final paths. Elsewhere a function may write only into a folder that `staged_folder` gave
# it (or a pipe or a scratch file of its own), and stands here by name with that reason.
STAGED = {
    "cli/streams.py:_silence_stdout": "opens the null device",
    "data/corpus.py:PartWriter._next_shard": "a shard, into the staged folder it is given",
    "data/corpus.py:PartWriter.return_to": "cuts a shard of the staged folder back",
    "operations/prepare.py:_kept": "a pipe's bytes, into the staged folder",
    "models/adapter_folder.py:save_adapter": "PEFT's files, into the staged folder it is given",
    "models/pooling.py:write_pooling": "sentence-transformers' files, into the staged folder it is given",
    "models/folder.py:save_model": "writes config.json beside the weights, into the staged folder it is given",
    "models/text_model.py:save_text_model": "a model of either kind, into the staged folder it is given",
    "models/encoder_folder.py:save_encoder": "config.json beside the weights, into the staged folder it is given",
    "onnx/external.py:ExternalData.__init__": "the large tensors, into the staged folder it is given",
    "onnx/folder.py:_write": "the graph, into the staged folder it is given",
    "operations/run_folder.py:RunFolder.save": "a checkpoint's files, into the staged folder it is given",
    "operations/sweep.py:_keep": "a copy of the best trial's model, into the staged folder",
}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_every_room_is_known() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(ROOMS)


# ----------------------------------------------------------------------------------------------------------------
# Start-up

HELP_OF_ALL = """
    import contextlib, io, json, sys
    import click
    before = set(sys.modules)
    from llmcli.cli.main import main

    def walk(command, words, context):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(click.exceptions.Exit):
            main.main([*words, "--help"], standalone_mode=False)
        assert "Usage:" in out.getvalue(), words
        shown.append(" ".join(words))
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                walk(command.get_command(context, name), [*words, name], context)

    shown = []
    walk(main, [], click.Context(main))
    roots = sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
    print(json.dumps({"shown": shown, "roots": [name for name in roots if not name.startswith("_")]}))
"""


def run_python(script: str) -> str:
    words = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout


def test_every_help_imports_click_and_the_standard_library_alone() -> None:
    found = json.loads(run_python(HELP_OF_ALL))
    assert len(found["shown"]) > 12
    assert set(found["roots"]) <= {"click", "llmcli"}


def test_the_package_itself_imports_nothing() -> None:
    loaded = run_python("import sys, llmcli; print(' '.join(m for m in sys.modules if m.startswith('llmcli')))").split()
    assert loaded == ["llmcli"]


def test_importing_the_command_line_loads_no_heavy_package() -> None:
    loaded = run_python("import sys, llmcli.cli.main; print(' '.join(sys.modules))").split()
    assert not [name for name in loaded if name.partition(".")[0] in BARRED_FROM_HELP]


def test_laying_out_a_model_imports_no_compiler() -> None:
    """torch._dynamo costs seconds, and a checkpoint's shapes are looked up on the meta device at every start."""
    script = """
        import sys
        from llmcli.models.config import DecoderConfig
        from llmcli.models.folder import expected_shapes
        for family in ("qwen3", "gpt2"):
            expected_shapes(DecoderConfig(family, 50, 16, 2, 2, 2, 8, 24, 64))
        print("torch._dynamo" in sys.modules)
    """
    assert run_python(script).strip() == "False"


# ----------------------------------------------------------------------------------------------------------------
# The direction of imports


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of everything that a file imports from llmcli, inside functions too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "llmcli")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: imports are written out in full"
            if (node.module or "").split(".")[0] == "llmcli":
                names = [alias.name for alias in node.names] if node.module == "llmcli" else [""]
                yield from ((node.lineno, f"{node.module}.{name}".rstrip(".")) for name in names)


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != PACKAGE], ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0]
    for line, module in imports_of(path):
        room = room_of(module)
        if room in ("__version__", own):
            continue
        assert room in ROOMS, f"{name_of(path)}:{line}: {module} is in no room"
        assert ROOMS[room] < ROOMS[own], f"{name_of(path)}:{line}: {own} must not import {module}"


def test_config_and_errors_stand_on_the_standard_library() -> None:
    for name in (
        "config.py",
        "config_bench.py",
        "config_convert.py",
        "config_embed.py",
        "config_evaluate.py",
        "config_export.py",
        "config_finetune.py",
        "config_generation.py",
        "config_objective.py",
        "settings.py",
        "errors.py",
    ):
        for node in ast.walk(tree_of(PACKAGE / name)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
                )
                for module in modules:
                    root = module.split(".")[0]
                    assert root in sys.stdlib_module_names or ROOMS.get(room_of(module), 9) < ROOMS[name[:-3]], (
                        f"{name}: {module}"
                    )


def test_only_the_command_line_knows_click_and_rich() -> None:
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] == "cli":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
                )
                roots = {module.split(".")[0] for module in modules}
                assert not roots & {"click", "rich"}, f"{name_of(path)}:{node.lineno}"


def test_building_and_running_graphs_imports_no_torch() -> None:
    modules = [f"llmcli.onnx.{path.stem}" for path in FILES if path.parent.name == "onnx" and path.stem != "__init__"]
    assert len(modules) > 5
    script = (
        f"import sys, {', '.join(modules)}, llmcli.runtime.onnx_session, llmcli.runtime.open, llmcli.operations.export"
    )
    assert "torch" not in run_python(f"{script}\nprint(*sys.modules)").split()
    for path in FILES:
        if path.parent.name == "onnx" or path.name == "onnx_session.py":
            imported = [
                name
                for node in ast.walk(tree_of(path))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
            ]
            assert "torch" not in {name.partition(".")[0] for name in imported}, name_of(path)


# ----------------------------------------------------------------------------------------------------------------
# Who writes, and what is never called

WRITING_METHODS = {"write_text", "write_bytes", "touch", "tofile", "rename", "hardlink_to", "symlink_to"}
WRITING_CALLS = {
    *("os.replace", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.makedirs", "os.truncate"),
    *("shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "shutil.move"),
    *("np.save", "np.savez", "numpy.save", "torch.save", "np.lib.format.open_memmap"),
}
WRITING_NAMES = {"save_file", "save_model", "save_weights", "save_tensors", "open_memmap", "copyfile", "copytree"}
READING_MODES = {"r", "rb", "rt", "br"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def mode_of(call: ast.Call, position: int) -> str | None:
    """The mode of an open() call, None when it is not written out."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    node = given[0] if given else call.args[position] if len(call.args) > position else ast.Constant("r")
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def is_write(call: ast.Call) -> bool:
    """Whether a call writes to the file system, as far as its form tells."""
    name = dotted(call.func)
    last = name.rsplit(".", 1)[-1] or (call.func.attr if isinstance(call.func, ast.Attribute) else "")
    if name in ("open", "io.open", "gzip.open", "lzma.open", "bz2.open"):
        return mode_of(call, 1) not in READING_MODES
    if last == "open" and name not in ("os.open", "Image.open"):
        return mode_of(call, 0) not in READING_MODES
    if name == "os.open":
        return any("O_WRONLY" in ast.dump(item) or "O_RDWR" in ast.dump(item) for item in call.args)
    return name in WRITING_CALLS or name in WRITING_NAMES or last in WRITING_METHODS


def functions_of(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the name of the outermost function or method that it stands in."""

    def walk(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            name = inside
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                in_class = isinstance(node, ast.ClassDef)
                name = f"{inside}.{child.name}" if in_class else (inside or child.name)
            if isinstance(child, ast.Call):
                yield name, child
            yield from walk(child, name)

    yield from walk(tree, "")


def test_only_the_files_room_writes_to_final_paths() -> None:
    writers: dict[str, list[int]] = {}
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] == "files":
            continue
        for function, call in functions_of(tree_of(path)):
            if is_write(call):
                writers.setdefault(f"{name_of(path)}:{function}", []).append(call.lineno)
    unknown = {where: lines for where, lines in writers.items() if where not in STAGED}
    assert unknown == {}, "write through llmcli.files, or into a staged folder (and say so in STAGED)"
    assert set(STAGED) <= set(writers), "STAGED names a function that no longer writes"


@pytest.mark.parametrize("line", ["open(p, 'w')", "p.open('ab')", "open(p, mode)", "p.write_text('')", "np.save(p, a)"])
def test_the_scan_sees_a_write(line: str) -> None:
    assert is_write(ast.parse(line).body[0].value)  # type: ignore[attr-defined]


@pytest.mark.parametrize("line", ["open(p)", "p.open()", "open(p, 'rb')", "p.read_text()", "np.load(p)"])
def test_the_scan_lets_reading_pass(line: str) -> None:
    assert not is_write(ast.parse(line).body[0].value)  # type: ignore[attr-defined]


NEVER = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen", "print", "breakpoint"}
NEVER_IMPORTED = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "tarfile",
    "zipfile",
    "requests",
    "urllib",
}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_dangerous_is_called(path: Path) -> None:
    tree = tree_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
            assert not {module.split(".")[0] for module in modules} & NEVER_IMPORTED, f"{name_of(path)}:{node.lineno}"
        if isinstance(node, ast.Call):
            where = f"{name_of(path)}:{node.lineno}"
            assert dotted(node.func) not in NEVER, where
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                assert (keyword.arg, value) not in {("shell", True), ("allow_pickle", True)}, where
                assert keyword.arg != "trust_remote_code", where


# ----------------------------------------------------------------------------------------------------------------
# Form


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_has_a_docstring_a_telling_name_and_at_most_400_lines(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= MOST_LINES
    assert path.stem not in ("utils", "util", "common", "helpers", "helper", "manager", "misc")
    assert ast.get_docstring(tree_of(path))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = tree_of(path)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            overload = any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list)
            assert overload or ast.get_docstring(node), f"{name_of(path)}:{node.lineno}: {node.name}"
