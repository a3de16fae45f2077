"""The demo's run, whole: it learns digits. (`make demo` and its figures: README.md, configs/digits.yaml.)"""

import json

import pytest
from conftest import ROOT, run_script


@pytest.mark.slow  # .ci/run makes the demo itself
def test_the_demo_draws_digits_that_a_classifier_reads(tmp_path):
    threads = {"OMP_NUM_THREADS": "2"}
    run_script("train.py", "--config", ROOT / "configs" / "digits.yaml", "--run-name", "digits", cwd=tmp_path, **threads)
    run_script("benchmarks/digits.py", "--ckpt", "results/digits", "--num-samples", 2000, "--out", "figures.json",
               cwd=tmp_path, **threads)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["label_accuracy"] >= 0.95
    assert figures["frechet_distance"] <= 0.8
    assert 0.97 < figures["label_accuracy_held_out"] < 1  # the classifier itself
