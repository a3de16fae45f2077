import json

import numpy as np
import pytest
import torch
from conftest import draw_images, numpys_distance, run_processes, value

import evaluate
from evaluation import metrics
from evaluation import survey as survey_module
from evaluation.extractors import flat_pixels
from evaluation.image_sets import open_set
from pipeline import checkpoint
from runtime.processes import World
from small_models import Classifier


def test_two_processes_give_the_figures_of_one(sets, tmp_path, monkeypatch, run_here):
    """Of everything: ADM's five, stand-ins with their floors, memorisation."""
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "classifier.pt", {"classifier": Classifier(10).state_dict(), "spec": {
        "network": {"num_classes": 10}, "size": [8, 8], "data": "digits", "test_images": 450, "test_accuracy": 0.1}})
    np.savez("train.npz", arr_0=draw_images(90, 2))
    flags = ["ref.npz", "samples.npz", "--classifier", "classifier.pt", "--training-images", "train.npz", "--device", "cpu"]
    monkeypatch.setattr(survey_module, "BATCH", 16)
    monkeypatch.setattr(metrics, "SPLIT", 20)
    assert run_here(evaluate, *flags, "--json", "one.json").returncode == 0
    run_processes(2, "evaluate_small", *flags, "--json", "two.json", cwd=tmp_path)
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    one, two = ([figure[key] for figure in report["figures"] for key in ("value", "floor") if figure[key] is not None]
                for report in reports)
    assert [report["processes"] for report in reports] == [1, 2]
    assert len(one) == 10 + 5
    assert two == pytest.approx(one, rel=1e-9)


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


def test_progress_is_called_after_each_batch_also_of_the_floor(sets, monkeypatch):
    monkeypatch.setattr(survey_module, "BATCH", 16)
    ref, samples, calls = open_set("ref.npz", "REF"), open_set("samples.npz", "SAMPLES"), []
    world, extractors = World(0, 1, torch.device("cpu")), {"pixels": flat_pixels}
    seen = survey_module.survey(ref, extractors, world, progress=lambda: calls.append(1))
    assert len(calls) == 10  # of 150 images
    survey_module.survey_floor(ref, samples, None, seen, extractors, world, progress=lambda: calls.append(1))
    assert len(calls) == 10 + 5 + 5  # of 70, and of the other 80


def test_without_training_images_the_floor_is_of_two_parts_of_ref(sets, figures, monkeypatch):
    seen = []
    np.savez("few.npz", arr_0=sets[0][:100])
    original = survey_module.survey
    monkeypatch.setattr(survey_module, "survey", lambda *args, indices=None, **kwargs: (
        seen.append(indices), original(*args, indices=indices, **kwargs))[1])
    found = figures("few.npz", "samples.npz", "--weights", "none")[0]["FD-pixel32"]
    assert found["floor_of"] == "N = 50 against 50"
    halves = [sets[0][:100][rows].reshape(50, -1) / 127.5 - 1 for rows in seen]
    assert found["floor"] == pytest.approx(numpys_distance(*halves), rel=1e-4)
    assert sorted(np.concatenate(seen)) == list(range(100))
    assert not np.array_equal(seen[0], np.arange(50))  # a random half
