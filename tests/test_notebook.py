"""examples/notebook.ipynb runs top to bottom in a real kernel (a running event loop) and leaves nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "notebook.ipynb"
KERNEL = "this-interpreter"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kernel of this very interpreter; Jupyter's own files stay in a folder of the test."""
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_PATH"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    folder = tmp_path / "jupyter_path" / "kernels" / KERNEL
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": KERNEL, "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    return KERNEL


def run(kernel: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Runs the notebook in `folder`; cell id → what the cell gave: its stdout, and its value by MIME type."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, kernel_name=kernel, timeout=120, resources=resources)
    client.execute()
    given: dict[str, dict[str, Any]] = {}
    for cell in notebook.cells:
        given[cell.id] = found = {"stdout": "", "value": {}}
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stdout":
                found["stdout"] += output.text
            elif output.output_type in ("execute_result", "display_data"):
                found["value"] = dict(output.data)
    return given


def test_the_notebook_stores_no_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_every_cell_gives_what_its_text_says(kernel: str, tmp_path: Path) -> None:
    cells = run(kernel, tmp_path)
    assert cells["call"]["value"]["text/plain"] == "['rank 0 is at step 1', 'rank 1 is at step 1']"
    assert cells["scatter"]["value"]["text/plain"] == "[1.5, 3.5]"
    assert cells["error"]["stdout"] == "failed ranks: [1]\nValueError('empty batch')\n"
    assert cells["await"]["value"]["text/plain"] == "['rank 0 is at step 11', 'rank 1 is at step 11']"
    assert cells["close"] == {"stdout": "", "value": {}}
    shown = cells["show"]["value"]
    assert " object at 0x" not in shown["text/plain"]
    for said in ("Trainer", "rank", "pid"):
        assert said in shown["text/plain"]
