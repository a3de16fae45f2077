import json

import classifier as classifier_script
import numpy as np
import pytest
from conftest import ROOT, draw_images, numpys_distance, run_script, value

import evaluate
from evaluation import metrics
from evaluation import survey as survey_module

PATCHED = """import sys
sys.path[:0] = [{root!r}, {tests!r}]
import evaluate
from evaluation import extractors, figures, image_sets, metrics, survey
from runtime import cli
from conftest import SMALL, SmallInception
extractors.Inception, extractors.inception_weights = SmallInception, lambda path: path
figures.STATISTICS = image_sets.STATISTICS = SMALL
survey.BATCH, metrics.SPLIT = 16, 20
cli.run(evaluate.main, evaluate.build_parser())
"""


def test_three_processes_give_the_figures_of_one(sets, tmp_path, monkeypatch, run_here):
    """Of everything: ADM's five, stand-ins with their floors, memorisation."""
    run_here(classifier_script, "--data-path", "digits", "--epochs", 1, "--out", "classifier.pt", "--device", "cpu")
    script = tmp_path / "patched_evaluate.py"
    script.write_text(PATCHED.format(root=str(ROOT), tests=str(ROOT / "tests")))
    flags = ["ref.npz", "samples.npz", "--classifier", "classifier.pt", "--training-images", "digits", "--device", "cpu"]
    monkeypatch.setattr(survey_module, "BATCH", 16)
    monkeypatch.setattr(metrics, "SPLIT", 20)
    assert run_here(evaluate, *flags, "--json", "one.json").returncode == 0
    run_script(script, *flags, "--json", "three.json", cwd=tmp_path, nproc=3)
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "three")]
    one, three = ([figure[key] for figure in report["figures"] for key in ("value", "floor") if figure[key] is not None]
                  for report in reports)
    assert (reports[0]["processes"], reports[1]["processes"]) == (1, 3)
    assert len(one) == 10 + 5
    assert three == pytest.approx(one, rel=1e-9)


def test_fd_pixel32_and_the_floor_of_as_many_training_images(sets, figures):
    train = draw_images(300, 2)
    np.savez("train.npz", arr_0=train)
    np.savez("few.npz", arr_0=train[:50])
    found = figures("ref.npz", "samples.npz", "--weights", "none", "--training-images", "train.npz")
    assert not {"FID-70", "Precision"} & set(found[0])
    real, fake = (images.reshape(len(images), -1) / 127.5 - 1 for images in sets)
    assert value(found, "FD-pixel32") == pytest.approx(numpys_distance(real, fake), rel=1e-4)
    assert found[0]["FD-pixel32"]["floor_of"] == "N = 70 against 150"
    few = figures("ref.npz", "samples.npz", "--weights", "none", "--training-images", "few.npz")[0]["FD-pixel32"]
    assert few["floor"] == pytest.approx(numpys_distance(real, train[:50].reshape(50, -1) / 127.5 - 1), rel=1e-4)
    assert (few["value"], few["floor_of"]) == (value(found, "FD-pixel32"), "N = 50 against 150")
    again = figures("ref.npz", "samples.npz", "--weights", "none", "--training-images", "train.npz")
    assert again[0] == found[0]


def test_without_training_images_the_floor_is_of_two_parts_of_ref(sets, figures, tmp_path):
    found = figures("ref.npz", "samples.npz", "--weights", "none")[0]["FD-pixel32"]
    assert found["floor_of"] == "N = 70 against 80"
    seen = []
    np.savez("few.npz", arr_0=sets[0][:100])
    original = survey_module.survey
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survey_module, "survey", lambda *args, indices=None, **kwargs: (
            seen.append(indices), original(*args, indices=indices, **kwargs))[1])
        found = figures("few.npz", "samples.npz", "--weights", "none")[0]["FD-pixel32"]
    assert found["floor_of"] == "N = 50 against 50"
    halves = [sets[0][:100][rows].reshape(50, -1) / 127.5 - 1 for rows in seen]
    assert found["floor"] == pytest.approx(numpys_distance(*halves), rel=1e-4)
    assert sorted(np.concatenate(seen)) == list(range(100))
    assert not np.array_equal(seen[0], np.arange(50))  # a random half
