"""`doctor`: what it reports comes from this machine, and something needed that does not work is found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Run

from llmcli.operations import doctor


def test_everything_needed_works_here(llmcli: Run) -> None:
    ended = llmcli("doctor", "--json", "--strict")
    assert ended.returncode == 0
    found = json.loads(ended.stdout)
    assert found["ok"] is True
    values = {finding["name"]: finding["value"] for finding in found["findings"]}
    assert values["CPUExecutionProvider"] == "loads"
    assert {"cores", "memory", "free here", "encoding", "torch", "torch.compile", "data"} <= set(values)
    assert {finding["level"] for finding in found["findings"]} <= {"ok", "note", "missing"}


def test_the_requirements_are_the_projects_own() -> None:
    assert {"click", "torch", "onnx-ir"} <= set(doctor.requirements())
    assert "matplotlib" in doctor.requirements("plot")
    assert "matplotlib" not in doctor.requirements()
    for extra in doctor.EXTRAS:
        assert doctor.requirements(extra), extra


def test_a_missing_package_is_found_and_strict_exits_3(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from llmcli.cli.doctor import doctor as command
    from llmcli.errors import CheckError

    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: None if package in ("numpy", "pyarrow") else real(package))
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["numpy"].level == "missing"
    assert findings["data"].level == "note"
    assert findings["data"].advice == "pip install 'llmcli[data]'"
    result = CliRunner().invoke(command, ["--strict"])
    assert isinstance(result.exception, CheckError)
    assert result.exception.exit_code == 3


def test_little_space_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage)
    assert doctor._disk(tmp_path).level == "note"


def test_a_processor_without_dot_products_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cpuinfo", lambda: {"flags": "sse2 avx2"})

    def names() -> Iterator[str]:
        for finding in doctor._instruction_sets():
            yield f"{finding.name}: {finding.value}"

    assert list(names()) == [
        "instruction sets: avx2",
        "int8: no dot product instructions",
        "bfloat16: none: training runs in float32",
    ]
