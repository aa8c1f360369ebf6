"""The notebooks of examples/ run from top to bottom, outside of the repository and without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="running notebooks takes nbclient, see `make dev`")
    pytest.importorskip("ipykernel", reason="running notebooks takes ipykernel, see `make dev`")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copy(EXAMPLES / name, tmp_path)
    notebook = nbformat.read(tmp_path / name, as_version=4)
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert any(output for cell in notebook.cells for output in cell.get("outputs", ()))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_kept_without_outputs(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert '"outputs": []' in text
    assert '"output_type"' not in text
