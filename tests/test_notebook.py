"""The example notebook, executed as a user would; and a sweep that is interrupted in a notebook."""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import count_reported_epochs
from jupyter_client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from test_python_api import SETTINGS

from raysweep.sweep.ledger import Ledger

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"
# Settings for short trainings; they suffice for networks that are better than chance, which the
# comparison in the notebook needs.
SMALL = {
    "data.train_size": 200,
    "data.val_size": 50,
    "batch_size": 16,
    "*.eps": 0.05,
    "*.attacks.*.steps": 2,
    "validation.finish.*.steps": 2,
    "validation.finish.*.runs": 1,
}


@pytest.fixture(scope="module")
def kernel(ray_cluster) -> Iterator[KernelManager]:
    """A kernel that joins the cluster of the tests. Both tests use it, because its imports take
    longer than a small sweep.
    """
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as sockets:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("RAY_ADDRESS", ray_cluster.address)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        # A port that is free when Jupyter chooses it may be Ray's when the kernel opens it.
        kernel = KernelManager(
            client_class="jupyter_client.asynchronous.AsyncKernelClient",
            transport="ipc",
            connection_file=f"{sockets}/kernel.json",
        )
        kernel.start_kernel()
        patch.undo()
        yield kernel
        kernel.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.mlflow
def test_the_notebook_runs(kernel: KernelManager, workdir: Path, empty_store) -> None:
    """The notebook runs through, with the settings of `SMALL` added to those of its sweeps and its
    pipeline.
    """
    empty_store(workdir / "mlflow.db")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    n_shortened = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            n_shortened += cell.source.count('"data.train_size": 200')
            cell.source = cell.source.replace('"data.train_size": 200', str(SMALL)[1:-1])
    assert n_shortened == 2, "of the sweeps, and of the pipeline"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%cd -q {workdir}"))
    client = NotebookClient(notebook, km=kernel, timeout=600)
    client.execute()
    client.kc.stop_channels()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [
        output for output in outputs if output.get("name") == "stderr" and "Error" in output["text"]
    ]
    text = "".join(output.get("text", "") for output in outputs)
    assert "robust" in text and "by robust_worst on the same" in text
    shown = [output["data"] for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 2, "epochs, and the comparison"
    # The live tables of both sweeps, as they were at last.
    tables = [data["text/plain"] for data in shown if "Ctrl-C stops" in data.get("text/plain", "")]
    assert [table.split(" trials done")[0].split("\n")[-1] for table in tables][:2] == [
        "2 of 2", "1 of 1"
    ]  # fmt: skip
    assert all("best@" in table for table in tables)
    htmls = [data.get("text/html", "") for data in shown]
    assert sum("Ctrl-C stops" in html and "<pre" in html for html in htmls) == len(tables)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.mlflow
def test_a_sweep_in_a_notebook_can_be_interrupted(
    kernel: KernelManager, workdir: Path, empty_store
) -> None:
    """The button of a notebook sends SIGINT to its kernel, in whose main thread cells run."""
    empty_store(workdir / "mlflow.db")
    client = BlockingKernelClient(**kernel.get_connection_info(session=True))
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        settings = {**SETTINGS, "epochs": 200}
        code = f"%cd -q {workdir}\nimport raysweep\n"
        code += f"raysweep.tune('at', trials=2, name='g1', settings={settings})"
        messages: list[dict[str, Any]] = []

        def interrupt_after_an_epoch() -> None:
            while not is_over.is_set() and not count_reported_epochs(workdir / "runs" / "g1"):
                time.sleep(0.05)
            kernel.interrupt_kernel()

        is_over = threading.Event()
        thread = threading.Thread(target=interrupt_after_an_epoch)
        thread.start()
        reply = client.execute_interactive(code, timeout=600, output_hook=messages.append)
        is_over.set()
        thread.join()
        content = reply["content"]
        assert content["status"] == "error" and content["ename"] == "WorkInterrupted", content
        assert "resume with raysweep.tune(resume='g1'" in content["evalue"]
        kinds = [message["msg_type"] for message in messages]
        assert "update_display_data" in kinds, "the table is updated in its place"
        ledger = Ledger.open(workdir / "runs" / "g1")
        trials = ledger.load_trials()
        assert trials and any(trial.state == "running" and trial.epoch for trial in trials)
        # The kernel lives, and reads what is there.
        code = "assert raysweep.load_sweep('g1').state == 'interrupted'"
        assert client.execute_interactive(code, timeout=600)["content"]["status"] == "ok"
    finally:
        client.stop_channels()
