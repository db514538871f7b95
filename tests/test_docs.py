"""The documentation is what the code says: the reference, the README's tables and tree, the public names, the links."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import forked
import pytest
from conftest import ROOT, Run
from small_encoder import make_encoder
from test_convert import write_bin, write_tokenizer

import llmcli as package
from llmcli.cli.main import COMMANDS, main


def load_generator() -> Any:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()
ALL = list(GENERATOR.commands())
LEAVES = [(name, command) for name, command in ALL if not isinstance(command, click.Group)]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
]


def test_the_reference_is_what_make_docs_writes() -> None:
    assert (ROOT / "docs" / "commands.md").read_text("utf-8") == GENERATOR.reference(), "run `make docs`"


def test_the_readmes_table_and_tree_are_what_make_docs_writes() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert text == GENERATOR.readme(text), "run `make docs`"


@pytest.mark.parametrize(("name", "command"), ALL, ids=[name for name, _ in ALL])
def test_every_command_is_described_in_the_imperative(name: str, command: click.Command) -> None:
    first = (command.help or "").strip().splitlines()[0]
    assert re.fullmatch(r"[A-Z].*\.", first), first
    assert first.split()[0] not in ("This", "The", "A") or command is main


def test_the_lines_of_the_lazy_table_are_the_commands_own() -> None:
    for name, (_, _, line) in COMMANDS.items():
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert line == (command.help or "").strip().splitlines()[0]


@pytest.mark.parametrize(("name", "command"), LEAVES, ids=[name for name, _ in LEAVES])
def test_every_command_has_an_example_whose_words_it_takes(name: str, command: click.Command) -> None:
    examples = GENERATOR.examples_of(command)
    assert examples
    for line in examples:
        words = shlex.split(line.split(" | ")[-1].split(" > ")[0].split(" >> ")[0])
        own = name.split()[1:]
        assert words[1 : 1 + len(own)] == own, line
        command.make_context(name, words[1 + len(own) :], resilient_parsing=False)


@pytest.mark.parametrize(("name", "command"), LEAVES, ids=[name for name, _ in LEAVES])
def test_every_option_is_explained_and_json_quiet_and_verbose_are_there(name: str, command: click.Command) -> None:
    flags = set()
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            flags |= set(parameter.opts)
            assert parameter.help, parameter.opts
            assert parameter.help.endswith((".", ")")), (parameter.opts, parameter.help)
    assert {"--json", "-q", "--quiet", "-v", "--verbose"} <= flags


# What the examples of the help are run on: the pipeline of the README in the order in which each needs the ones before.
PIPELINE = """
tokenizer train notes.txt --vocab-size 400 -o tokenizer
tokenizer encode -t tokenizer "Hello" --ids
tokenizer decode -t tokenizer 39 68
tokenizer info tokenizer notes.txt
data check notes.txt
data prepare notes.txt -t tokenizer -o corpus
pretrain corpus -o runs/first --layers 1 --hidden-size 16 --heads 2 --context 48 --max-steps 3 --threads 1
finetune chat runs/first sums.jsonl -o runs/chat --max-steps 2 --threads 1
finetune classify runs/first labels.tsv -o runs/adapter --lora --max-steps 2 --threads 1
finetune prefer runs/chat preferences.jsonl -o runs/preferred --max-steps 2 --threads 1
fill-mask -m bert-base-uncased "Paris is the [MASK] of France." --threads 1
classify -m runs/first --adapter runs/adapter "A boat." --threads 1
finetune embed runs/first scores.csv -o runs/vectors --max-steps 2 --threads 1
embed -m runs/first "Deep learning is fun." --pooling mean --threads 1
similar index notes.txt -m runs/first -o notes-index --threads 1
similar search notes-index "Where did the old man go?" -n 3 --threads 1
finetune answer runs/first squad.json -o runs/answers --max-steps 2 --threads 1
answer -m runs/answers --context boat.txt Where? --max-tokens 3 --threads 1
finetune summarize runs/first pairs.jsonl -o runs/summaries --max-steps 2 --threads 1
summarize -m runs/summaries --input notes.txt --max-tokens 3 --threads 1
merge runs/first runs/adapter -o merged
plot runs/first
evaluate runs/first held-out.txt --threads 1
generate -m runs/first "Once upon a time" --max-new-tokens 3 --threads 1
complete -m runs/first "The old m" -n 2 --threads 1
export runs/first -o first-int4 --calibration notes.txt --threads 1
generate -m first-int4 "Once upon a time" --max-new-tokens 3 --threads 1
bench -m runs/first -m first-int4 --prompt-tokens 8 --new-tokens 4 --rounds 1 --threads 1
convert stories15M.bin --tokenizer tokenizer.bin -o stories
chat -m runs/first --template chat.jinja --max-new-tokens 3 --threads 1
info runs/first
verify runs/first
doctor
completion bash
""".strip().splitlines()


def test_the_pipeline_of_the_readme_runs_from_end_to_end(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "notes.txt").write_text("The old man went to the sea. Once upon a time there was a boat.\n" * 60)
    (place / "held-out.txt").write_text("The old man had a boat.\n" * 4)
    (place / "labels.tsv").write_text("text\tlabel\na boat\tsea\na man\tland\n" * 4)
    (place / "sums.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1", "completion": "2"}\n')
    (place / "boat.txt").write_text("A boat.")
    questions = [
        {"context": "A boat.", "question": "What?", "answers": ["boat"]},
        {"context": "A", "question": "Where?"},
    ]
    (place / "squad.json").write_text(json.dumps([{"answers": [], **each} for each in questions]))
    pairs = [{"source": "A boat.", "target": "boat"}, {"source": "A man.", "target": "man"}]
    scores = "".join(f"A boat {number},A man,{number}\n" for number in range(8))
    (place / "scores.csv").write_text("sentence1,sentence2,score\n" + scores)
    (place / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs))
    pair = '{"prompt": "1+%d=", "chosen": "2", "rejected": "3"}\n'
    (place / "preferences.jsonl").write_text("".join(pair % number for number in range(4)))
    (place / "chat.jinja").write_text("{{ messages[-1].content }}")
    (place / "message.jsonl").write_text('{"role": "user", "content": "The old"}\n')
    write_bin(place / "stories15M.bin")
    make_encoder(place / "bert-base-uncased")
    write_tokenizer(place / "tokenizer.bin")
    for line in PIPELINE:
        told = forked.run(
            *shlex.split(line), cwd=place, stdin="message.jsonl" if line.startswith("chat") else None
        ).stderr
        assert "Traceback" not in told
    covered = {" ".join(name.split()[1:]) for name, _ in LEAVES} - {"quickstart"}
    assert covered <= {name for name in covered if any(line.startswith(name) for line in PIPELINE)}


def test_the_public_names_are_there_and_documented() -> None:
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        assert name == "__version__" or value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = package.trian


def test_the_names_for_type_checkers_are_the_public_names() -> None:
    tree = ast.parse((ROOT / "llmcli" / "__init__.py").read_text("utf-8"))
    named = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert named - {None} >= set(package.__all__) - {"__version__"}


def test_a_public_name_alone_imports_no_torch() -> None:
    script = "import sys, llmcli; llmcli.PretrainConfig; llmcli.load_tokenizer; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_the_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


def test_every_make_target_that_the_documents_name_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for path in DOCUMENTS:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text("utf-8"), re.MULTILINE):
            assert target in targets, f"{path.name}: make {target}"


def test_every_benchmark_is_listed() -> None:
    listed = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert f"`{path.name}`" in listed, path.name


def test_the_changelog_knows_the_version() -> None:
    assert f"## {package.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_what_make_completions_writes(llmcli: Run, shell: str) -> None:
    name = {"bash": "llmcli.bash", "zsh": "_llmcli", "fish": "llmcli.fish"}[shell]
    assert (ROOT / "completions" / name).read_text("utf-8") == llmcli("completion", shell).stdout


def test_the_json_keys_that_files_md_promises_are_there(llmcli: Run, tmp_path: Path) -> None:
    """The table of JSON keys in docs/files.md, held against what the commands print."""
    (tmp_path / "notes.txt").write_text("The old man went to the sea.\n" * 60)
    told = (ROOT / "docs" / "files.md").read_text("utf-8")
    for line in (
        "tokenizer train notes.txt --vocab-size 300 -o tokenizer --json",
        "data check notes.txt --json",
        "data prepare notes.txt -t tokenizer -o corpus --json",
        "info corpus --json",
        "verify corpus --json",
        "tokenizer info tokenizer notes.txt --json",
    ):
        found = llmcli(*shlex.split(line), cwd=tmp_path)
        assert found.returncode == 0, found.stderr
        for key in json.loads(found.stdout):
            assert f"`{key}`" in told, f"{line}: {key}"


def test_no_page_shows_an_escape_that_was_meant_for_click() -> None:
    assert "\\b" not in (ROOT / "docs" / "commands.md").read_text()
