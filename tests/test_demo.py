"""The demo's run, whole: it learns digits. (`make demo` and its figures: README.md, configs/digits.yaml.)"""

import json

import numpy as np
import pytest
from conftest import ROOT, run_script
from sklearn.svm import SVC

from training.datasets import load_dataset


@pytest.mark.slow  # .ci/run makes the demo itself
def test_the_demo_draws_digits_that_classifiers_read(tmp_path):
    def run(script, *flags):
        run_script(script, *flags, cwd=tmp_path)

    run("train.py", "--config", ROOT / "configs" / "digits.yaml", "--run-name", "digits")
    run("sample_ddp.py", "--ckpt", "results/digits", "--num-fid-samples", 2000, "--per-proc-batch-size", 500)
    run("benchmarks/classifier.py", "--data-path", "digits", "--epochs", 20, "--out", "classifier.pt")
    (samples,) = (tmp_path / "samples").glob("*.npz")
    run("evaluate.py", "digits", samples, "--weights", "none", "--training-images", "digits", "--classifier", "classifier.pt",
        "--json", "figures.json")
    figures = {figure["name"]: figure for figure in json.loads((tmp_path / "figures.json").read_text())["figures"]}
    assert figures["Label accuracy"]["value"] >= 0.95
    assert 0.97 < figures["Label accuracy"]["floor"] < 1  # the classifier itself
    assert figures["FD-pixel32"]["value"] <= 0.8

    def flat(images):
        return images.reshape(len(images), -1)

    train = load_dataset("digits")
    classifier = SVC(gamma="scale").fit(flat(train.images.numpy()), train.labels)
    with np.load(samples) as drawn:
        assert classifier.score(flat(drawn["arr_0"][..., 0]), drawn["arr_1"]) >= 0.95
