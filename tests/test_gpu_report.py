import json

import gpu_report
import pytest
import torch
from conftest import assert_one_line, run_script

from benchmarks import reports

FLAGS = ["--toy", "--device", "cpu"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "report.json"


def test_ceilings_in_miniature(out, tmp_path):
    done = run_script("benchmarks/gpu_report.py", *FLAGS, "--stages", "ceilings", "--out", out, cwd=tmp_path)
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
    again = run_script("benchmarks/gpu_report.py", *FLAGS, "--stages", "ceilings", "--out", out, cwd=tmp_path)
    assert out.read_text() == before
    assert "ceilings: copy" in done.stdout
    assert "ceilings: copy" not in again.stdout  # it was there


def test_a_stage_that_takes_too_long_is_stopped_and_the_others_go_on(out, tmp_path):
    stages = ("ceilings", "sizes")
    done = run_script("benchmarks/gpu_report.py", *FLAGS, "--stages", *stages, "--limit", 1, "--out", out, cwd=tmp_path)
    for stage in stages:
        assert f"{stage}: stopped after 1 s; the same command goes on" in done.stdout
    assert json.loads(out.read_text())["stages"] == {}
    assert out.with_suffix(".md").exists()


@pytest.mark.slow
def test_every_stage_in_miniature(out, tmp_path):
    done = run_script("benchmarks/gpu_report.py", *FLAGS, "--out", out, cwd=tmp_path)
    report = json.loads(out.read_text())
    assert report["failed"] == {}, done.stdout
    assert list(report["stages"]) == list(gpu_report.STAGES)
    for ways in report["stages"]["sampling"].values():
        assert [row["model_calls"] for row in ways.values()] == [6, 6, 4, 2, 4, 4]
        assert ways["ddpm encoder"]["block_calls"] < ways["ddpm"]["block_calls"]
    for rows in report["stages"]["networks"].values():
        assert list(rows) == list(gpu_report.TOY.networks)
        for row in rows.values():
            assert row["images_per_second"] > 0
            assert sum(row.get(kind, 0) for kind in gpu_report.KINDS) == pytest.approx(1)
    (rows,) = report["stages"]["waiting"].values()
    assert 0 <= rows["train.py"]["data_wait_share"] <= 1
    assert 0 <= rows["sample_ddp.py"]["between_batches_share"] <= 1


def test_the_table_shows_what_is_off():
    report = {"settings": {"device": "H200", "torch": "2", "toy": False}, "date": "today",
              "failed": {"sizes: x": "out of memory"},
              "stages": {"networks": {"train batch 64": {"DiNext-XL/2": {"images_per_second": 520.0, "ratio": None}}}}}
    expectations = {"about": "estimates", "figures": {
        "networks: train batch 64: DiNext-XL/2": {"images_per_second": 1040, "ratio": 2}}}
    lines = reports.markdown(report, expectations).splitlines()
    row = next(line for line in lines if line.startswith("| train"))
    assert row == "| train batch 64: DiNext-XL/2 | images_per_second 520 | images_per_second 1040, ratio 2 | 0.50 |"
    assert lines[-1] == "Failed: sizes: x: out of memory"


def test_expectations_name_figures_that_the_report_has():
    """Each names an item of its stage, as a GPU run would list it."""
    figures = json.loads(gpu_report.EXPECTATIONS.read_text())["figures"]
    assert len(figures) >= 8
    for name in figures:
        stage, item, row = name.split(": ")
        assert item in [found for found, _ in gpu_report.STAGES[stage](gpu_report.Scale(), None)]
        assert row


def test_a_failure_is_recorded_and_the_next_figure_is_measured(out, monkeypatch):
    def fail():
        raise RuntimeError("no memory")

    def stage(scale, device):
        yield "one", fail
        yield "two", lambda: {"row": {"figure": 1.0}}

    monkeypatch.setitem(gpu_report.STAGES, "ceilings", stage)
    monkeypatch.setattr(gpu_report.os, "setsid", lambda: None)
    gpu_report.open_report(out, {"device": "cpu"})
    gpu_report.run_stage("ceilings", out, True, "cpu")
    report = json.loads(out.read_text())
    assert report["failed"] == {"ceilings: one": "no memory"}
    assert report["stages"] == {"ceilings": {"two": {"row": {"figure": 1.0}}}}


def test_wrong_input_is_one_line(run_here, out, tmp_path):
    assert_one_line(run_here(gpu_report, *FLAGS, "--out", out, "--stages", "speed"), "--stages", "speed")
    assert_one_line(run_here(gpu_report, *FLAGS, "--out", tmp_path / "report.txt"), "--out", ".json")
    out.write_text("{}")
    assert_one_line(run_here(gpu_report, *FLAGS, "--out", out), "--out", "no report of this script")
    out.write_text(json.dumps({"settings": {"device": "H200", "torch": "2", "toy": True}}))
    assert_one_line(run_here(gpu_report, *FLAGS, "--out", out), "--out", "another device, torch")
