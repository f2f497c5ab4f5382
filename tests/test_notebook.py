"""The notebook of examples/, cell by cell, with less training."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "first_steps.ipynb"
LESS = {"max_epochs=40": "max_epochs=1"}


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for whole, less in LESS.items():
        assert whole in code
        code = code.replace(whole, less)
    Path("cells.py").write_text(code)
    found = runpy.run_path("cells.py")
    assert set(found["table"]["state"]) == {"finished"} and len(found["table"]) == 4
    assert found["test"].x.shape == (179, 1, 8, 8) and found["posterior"].mean.shape[0] == 179
    assert found["kl"].min() > 0 and found["kl"][found["first"]] == found["kl"].max()
