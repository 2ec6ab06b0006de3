"""The example notebook, executed as a user would."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


@pytest.mark.slow
@pytest.mark.ray
def test_the_notebook_runs(ray_cluster, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sweep runs on the cluster of the tests, which raysweep finds in the environment."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(workdir)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [
        output for output in outputs if output.get("name") == "stderr" and "Error" in output["text"]
    ]
    text = "".join(output.get("text", "") for output in outputs)
    assert "robust" in text and any("image/png" in output.get("data", {}) for output in outputs)
