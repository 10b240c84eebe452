"""Every notebook runs from its first cell to its last, at tiny size, and is stored tidily."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fresh import ROOT

from .notebooks import INSTALL, PARAMETERS, read, run, tags, with_parameters
from .test_examples import all_accelerated

NOTEBOOKS = {"chat_decoder": "decoder", "classify_encoder": "encoder", "translate_encoder_decoder": "encoder-decoder"}
"""The kind of model that each is for."""


def path_of(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def sources(name: str, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in read(path_of(name))["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_all_cells_in_order(
    name: str,
    model_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))  # a cell sets it
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    run(path_of(name), parameters(name, model_of))
    check(capsys.readouterr().out, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_all_cells_in_a_process_of_their_own(name: str, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.examples.notebooks", str(path_of(name)), json.dumps(parameters(name, model_of))],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check(done.stdout, tmp_path)


def parameters(name: str, model_of: Callable[[str], Path]) -> dict[str, Any]:
    """Of a notebook at tiny size."""
    return {"MODEL": str(model_of(NOTEBOOKS[name])), "MAX_STEPS": 2, "OUTPUT": "adapter"}


def check(printed: str, folder: Path) -> None:
    """What a notebook printed, and the models that it left in its folder."""
    assert re.search(r"verify: passed, \d+ checks", printed) and "left as is" in printed
    all_accelerated(report(printed))
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "adapter-merged" / "model.safetensors").is_file()


def report(printed: str) -> str:
    """The report among all that a notebook printed."""
    found = re.search(r"^fastpeft: \d+ of .*\n(?:(?:module|base_model|note:).*\n)+", printed, re.MULTILINE)
    assert found, printed
    return found[0]


def test_every_notebook_has_a_test() -> None:
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
class TestWhatIsStored:
    def test_the_format(self, name: str) -> None:
        """That of nbformat 4.5, as far as a notebook without outputs uses it."""
        notebook = read(path_of(name))
        assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
        assert notebook["metadata"]["kernelspec"] == {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        }
        ids = [cell["id"] for cell in notebook["cells"]]
        assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one) for one in ids)
        for cell in notebook["cells"]:
            check_cell(cell)

    def test_no_outputs(self, name: str) -> None:
        for cell in read(path_of(name))["cells"]:
            assert cell["cell_type"] != "code" or (cell["outputs"] == [] and cell["execution_count"] is None)

    def test_the_file_is_as_jupyter_writes_it(self, name: str) -> None:
        text = path_of(name).read_text(encoding="utf-8")
        assert text == json.dumps(read(path_of(name)), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def test_parameters_come_first_and_are_all_that_is_replaced(self, name: str) -> None:
        code = [cell for cell in read(path_of(name))["cells"] if cell["cell_type"] == "code"]
        assert [PARAMETERS in tags(cell) for cell in code] == [True, *[False] * (len(code) - 1)]
        found = ast.parse("".join(code[0]["source"])).body
        names = [one.targets[0].id for one in found if isinstance(one, ast.Assign)]  # type: ignore[attr-defined]
        assert names == ["MODEL", "SOURCE", "MAX_STEPS", "OUTPUT"] and len(found) == len(names)

    def test_one_cell_installs(self, name: str) -> None:
        code = [cell for cell in read(path_of(name))["cells"] if cell["cell_type"] == "code"]
        installs = ["".join(cell["source"]) for cell in code if INSTALL in tags(cell)]
        assert installs == ['%pip install -q "{SOURCE}"']
        others = [line for cell in code if INSTALL not in tags(cell) for line in cell["source"]]
        assert [line for line in others if line.startswith(("!", "%"))] == ["!fastpeft doctor"]

    def test_one_gpu_is_chosen_before_torch_is_imported(self, name: str) -> None:
        text = "\n".join(sources(name, "code"))
        assert 0 < text.index("CUDA_VISIBLE_DEVICES") < text.index("import torch")

    def test_nothing_is_said_to_be_measured(self, name: str) -> None:
        assert "nothing has been measured" in sources(name, "markdown")[0]


def check_cell(cell: dict[str, Any]) -> None:
    common = {"cell_type", "id", "metadata", "source"}
    assert cell.keys() == common | ({"execution_count", "outputs"} if cell["cell_type"] == "code" else set())
    assert cell["cell_type"] in ("code", "markdown") and cell["metadata"].keys() <= {"tags"}
    lines = cell["source"]
    assert lines and all(isinstance(line, str) and line.find("\n") in (-1, len(line) - 1) for line in lines)
    assert all(line.endswith("\n") for line in lines[:-1]) and not lines[-1].endswith("\n")


class TestTheRunner:
    def write(self, folder: Path, *cells: tuple[str, list[str]]) -> Path:
        path = folder / "a.ipynb"
        found = [
            {"cell_type": "code", "id": str(number), "metadata": {"tags": given}, "source": source.splitlines(True)}
            for number, (source, given) in enumerate(cells)
        ]
        path.write_text(json.dumps({"cells": found}))
        return path

    def test_cells_share_their_names(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, ("A = 1\nB = 2", [PARAMETERS]), ("%pip install x", [INSTALL]), ("C = A + B", []))
        assert run(path, {"A": 5})["C"] == 7

    def test_a_command_is_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run(self.write(tmp_path, ("!fastpeft --version", [])), {})
        assert capsys.readouterr().out.startswith("fastpeft ")

    @pytest.mark.parametrize("line", ["!rm x", "!fastpeft nope"])
    def test_a_command_that_is_wrong(self, tmp_path: Path, line: str) -> None:
        with pytest.raises(AssertionError):
            run(self.write(tmp_path, (line, [])), {})

    def test_a_name_that_is_no_parameter(self) -> None:
        with pytest.raises(KeyError, match="B"):
            with_parameters("A = 1", {"B": 2})

    def test_an_error_names_its_cell(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError) as caught:
            run(self.write(tmp_path, ("1 / 0", [])), {})
        assert "a.ipynb, cell 0" in str(caught.traceback[-1].path)
