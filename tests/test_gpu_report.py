import json
from functools import partial

import gpu_report
import pytest
import torch
from conftest import assert_one_line

from models import DiT, DiT_models

FLAGS = ["--device", "cpu"]


@pytest.fixture
def out(tmp_path, monkeypatch):
    """The report's path; what is measured is tiny."""
    for name, value in dict(MATMUL=64, COPIED=2**12, DEPTHWISE=((2, 8, 6),), DENSE=((2, 4, 6),), REPEATS=1, LATENT=8,
                            NETWORKS=("DiT-S/2",),
                            SETTING=gpu_report.throughput.Setting("train", "fp32", False, 1)).items():
        monkeypatch.setattr(gpu_report, name, value)
    monkeypatch.setitem(gpu_report.throughput.MATMUL_SIZE, "cpu", 16)
    monkeypatch.setitem(DiT_models, "DiT-S/2", partial(DiT, patch_size=2, depth=1, hidden_size=24, num_heads=2))
    return tmp_path / "report.json"


def test_both_stages_in_miniature_and_once(run_here, out):
    first = run_here(gpu_report, *FLAGS, "--out", out)
    assert first.returncode == 0, first.stderr
    report = json.loads(out.read_text())
    assert report["failed"] == {}
    ceilings, networks = report["stages"]["ceilings"], report["stages"]["networks"]
    assert list(ceilings) == ["matmul bf16 64", "matmul tf32 64", "copy 0.00390625 MiB", "depthwise 7x7 B 2 D 8 6x6",
                              "dense 3x3 B 2 D 4 6x6"]
    for kind in ("depthwise 7x7 B 2 D 8 6x6", "dense 3x3 B 2 D 4 6x6"):
        for name, row in ceilings[kind].items():
            for key in ("forward", "dgrad", "wgrad"):
                sums_in_bf16 = key == "dgrad" and torch.backends.cpu.get_cpu_capability() == "AVX2"  # torch's kernel: 0.007
                assert 0 < row[f"{key}_error"] < ((1e-2 if sums_in_bf16 else 5e-3) if "bfloat16" in name else 1e-6)
            assert row["three_passes_ms"] == pytest.approx(sum(row[f"{key}_ms"] for key in ("forward", "dgrad", "wgrad")))
    assert list(networks) == ["train batch 1", "forward batch 1"]
    for rows in networks.values():
        assert list(rows) == ["DiT-S/2"]
        assert all(row["images_per_second"] > 0 for row in rows.values())
    before = out.read_text()
    again = run_here(gpu_report, *FLAGS, "--out", out)
    assert out.read_text() == before
    assert "ceilings: copy" in first.stdout
    assert "ceilings: copy" not in again.stdout  # it was measured already


def test_a_failure_is_recorded_and_the_next_figure_is_measured(out, monkeypatch, run_here):
    def fail():
        raise RuntimeError("no memory")

    def stage(device):
        yield "one", fail
        yield "two", lambda: {"row": {"figure": 1.0, "none": None}}

    monkeypatch.setitem(gpu_report.STAGES, "ceilings", stage)
    done = run_here(gpu_report, *FLAGS, "--stages", "ceilings", "--out", out)
    report = json.loads(out.read_text())
    assert report["failed"] == {"ceilings: one": "no memory"}
    assert report["stages"] == {"ceilings": {"two": {"row": {"figure": 1.0, "none": None}}}}
    assert "  row: figure 1\n" in done.stdout


def test_wrong_input_is_one_line(run_here, out, tmp_path):
    assert_one_line(run_here(gpu_report, *FLAGS, "--out", tmp_path / "report.txt"), "--out", ".json")
    out.write_text("[]")
    assert_one_line(run_here(gpu_report, *FLAGS, "--out", out), f"{out} is not a JSON object")
    out.write_text(json.dumps({"settings": {"device": "H200", "torch": "2"}}))
    assert_one_line(run_here(gpu_report, *FLAGS, "--out", out), f"--out {out}", "another device, torch")
