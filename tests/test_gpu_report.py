import json

import gpu_report
import pytest
import torch
from conftest import assert_one_line

FLAGS = ["--toy", "--device", "cpu"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "report.json"


def test_ceilings_in_miniature(run_here, out):
    first = run_here(gpu_report, *FLAGS, "--stages", "ceilings", "--out", out)
    assert first.returncode == 0, first.stderr
    report = json.loads(out.read_text())
    assert report["failed"] == {}
    items = report["stages"]["ceilings"]
    assert list(items) == ["matmul bf16 64", "matmul tf32 64", "copy 0.00390625 MiB", "depthwise 7x7 B 2 D 8 6x6"]
    for name, row in items["depthwise 7x7 B 2 D 8 6x6"].items():
        for key in ("forward", "dgrad", "wgrad"):
            sums_in_bf16 = key == "dgrad" and torch.backends.cpu.get_cpu_capability() == "AVX2"  # torch's kernel there: 0.007
            assert 0 < row[f"{key}_error"] < ((1e-2 if sums_in_bf16 else 5e-3) if "bfloat16" in name else 1e-6)
        assert row["three_passes_ms"] == pytest.approx(sum(row[f"{key}_ms"] for key in ("forward", "dgrad", "wgrad")))
    assert "| copy 0.00390625 MiB: copy_ | terabytes_per_second" in out.with_suffix(".md").read_text()
    before = out.read_text()
    again = run_here(gpu_report, *FLAGS, "--stages", "ceilings", "--out", out)
    assert out.read_text() == before
    assert "ceilings: copy" in first.stdout
    assert "ceilings: copy" not in again.stdout  # it was measured already


@pytest.mark.slow
def test_every_stage_in_miniature(run_here, out):
    done = run_here(gpu_report, *FLAGS, "--out", out)
    report = json.loads(out.read_text())
    assert report["failed"] == {}, done.stdout
    assert list(report["stages"]) == list(gpu_report.STAGES)
    for rows in report["stages"]["sampling"].values():
        assert [row["model_calls"] for row in rows.values()] == [6, 6, 4, 2, 4, 4]
        assert rows["ddpm encoder"]["block_calls"] < rows["ddpm"]["block_calls"]
    for rows in report["stages"]["networks"].values():
        assert list(rows) == list(gpu_report.TOY.networks)
        for row in rows.values():
            assert row["images_per_second"] > 0
            assert sum(row.get(kind, 0) for kind in ("attention", "convolution", "matmul", "other")) == pytest.approx(1)
    (rows,) = report["stages"]["waiting"].values()
    assert 0 <= rows["train.py"]["data_wait_share"] <= 1
    assert 0 <= rows["sample_ddp.py"]["between_batches_share"] <= 1


def test_a_failure_is_recorded_and_the_next_figure_is_measured(out, monkeypatch, run_here):
    def fail():
        raise RuntimeError("no memory")

    def stage(scale, device):
        yield "one", fail
        yield "two", lambda: {"row": {"figure": 1.0, "none": None}}

    monkeypatch.setitem(gpu_report.STAGES, "ceilings", stage)
    assert run_here(gpu_report, *FLAGS, "--stages", "ceilings", "--out", out).returncode == 0
    report = json.loads(out.read_text())
    assert report["failed"] == {"ceilings: one": "no memory"}
    assert report["stages"] == {"ceilings": {"two": {"row": {"figure": 1.0, "none": None}}}}
    lines = out.with_suffix(".md").read_text().splitlines()
    assert "| two: row | figure 1 |" in lines
    assert lines[-1] == "Failed: ceilings: one: no memory"


def test_wrong_input_is_one_line(run_here, out, tmp_path):
    assert_one_line(run_here(gpu_report, *FLAGS, "--out", tmp_path / "report.txt"), "--out", ".json")
    out.write_text("{}")
    assert_one_line(run_here(gpu_report, *FLAGS, "--out", out), f"--out {out}", "not a report")
    out.write_text(json.dumps({"settings": {"device": "H200", "torch": "2", "toy": True}}))
    assert_one_line(run_here(gpu_report, *FLAGS, "--out", out), f"--out {out}", "another device, torch")
