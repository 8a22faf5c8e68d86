"""Every notebook is committed without outputs, runs from a clean kernel without a network, and leaves a picture."""

import base64
import io
import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOWHERE = "http://127.0.0.1:9"
"""A proxy that is not there: whoever looks for a network, fails."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "no_proxy": "",
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE),
}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_four() -> None:
    names = ["01_unified_view", "02_new_target", "03_subclass_training_step", "04_from_checkpoint"]
    assert [path.stem for path in NOTEBOOKS] == names


@every_notebook
def test_no_outputs_are_committed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@every_notebook
def test_runs_from_a_clean_kernel_and_leaves_a_picture(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    client.execute(env={**os.environ, **ENVIRONMENT})
    outputs = [output.get("data", {}) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) for data in outputs if "image/png" in data]
    assert any(min(picture.size) > 200 and np.asarray(picture.convert("L")).std() > 20 for picture in pictures)
