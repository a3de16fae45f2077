"""Every cell of the notebooks runs."""

import json
import signal

import matplotlib
import matplotlib.pyplot as plt
import pytest
from conftest import ROOT

from training import previews

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_and_draws(path, tiny_run, photographs, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("DINEXT_CKPT", str(tiny_run))
    monkeypatch.setenv("DINEXT_PHOTOS", str(photographs))
    monkeypatch.setenv("DINEXT_STEPS", "4")
    monkeypatch.setattr(previews, "PREVIEW_ROWS", 1)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # a run would keep Ctrl-C from pytest
    names, drawn = {}, []
    for cell in cells(path):
        exec("".join(cell["source"]), names)
        drawn.append(bool(plt.get_fignums()))
        plt.close("all")
    stored = ["image/png" in json.dumps(cell["outputs"]) for cell in cells(path)]
    assert drawn == stored
    assert sum(drawn) >= 2


def test_outputs_are_small():
    assert len(NOTEBOOKS) == 3
    assert max(path.stat().st_size for path in NOTEBOOKS) < 200_000
