import numpy as np
import pytest
import torch
from conftest import all_features, draw_images, numpys_distance, value
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

import evaluate
from evaluation import extractors, metrics
from evaluation import figures as figure_list
from runtime.files import sha256


def torch_fidelitys_precision_and_recall(real, fake):
    found = prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    return found["precision"], found["recall"]


def test_the_five_figures_are_those_of_all_features_at_once(sets, figures, monkeypatch):
    """Three batches of one set, two of the other, the last ones ragged; two splits, in the middle of a batch."""
    monkeypatch.setattr(metrics, "SPLIT", 35)
    found = figures("ref.npz", "samples.npz", "--pr-precision", "fp32")
    real, fake = map(all_features, sets)
    assert value(found, "FID-70") == pytest.approx(numpys_distance(real["pool"], fake["pool"]), rel=1e-6)
    assert value(found, "sFID-70") == pytest.approx(numpys_distance(real["spatial"], fake["spatial"]), rel=1e-6)
    p = np.exp(fake["logits"]) / np.exp(fake["logits"]).sum(axis=1, keepdims=True)
    scores = [np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()) for part in (p[:35], p[35:])]
    assert value(found, "Inception Score") == pytest.approx(np.mean(scores), rel=1e-6)
    near = torch_fidelitys_precision_and_recall(*(torch.from_numpy(features["pool"]).float() for features in (real, fake)))
    assert (value(found, "Precision"), value(found, "Recall")) == pytest.approx(near, abs=1e-6)
    assert near[0] > near[1]  # the samples spread less
    assert found[0]["FID-70"]["remark"] == "biased upwards, as N is below 50,000"
    assert found[1]["peak_memory_gib"] > 0.1


@pytest.mark.slow
def test_all_figures_are_torch_fidelitys_on_the_same_network(figures, inception_file, theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256(inception_file))
    sets = [draw_images(40, 0, size=24), draw_images(30, 1, size=24, spread=30)]
    for name, images in zip(("ref", "samples"), sets):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    found = figures(tmp_path / "ref.npz", tmp_path / "samples.npz", "--weights", inception_file, "--pr-precision", "fp32")
    (real, _, _), (fake, logits, _) = (theirs(torch.from_numpy(images).permute(0, 3, 1, 2)) for images in sets)
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, (real.double(), fake.double())), verbose=False)
    score = isc_features_to_metric(logits, splits=1, shuffle=False)
    assert value(found, "FID-30") == pytest.approx(fid["frechet_inception_distance"], rel=1e-4)
    assert value(found, "Inception Score") == pytest.approx(score["inception_score_mean"], rel=1e-5)
    near = torch_fidelitys_precision_and_recall(real, fake)
    assert (value(found, "Precision"), value(found, "Recall")) == pytest.approx(near, abs=1e-6)


def test_distances_are_adms_where_no_precision_is_given_and_enough_samples_make_a_plain_fid(sets, figures, monkeypatch):
    monkeypatch.setattr(figure_list, "ENOUGH", 70)
    monkeypatch.setattr(figure_list, "precision_and_recall", lambda real, fake, precision: (len(real), len(precision)))
    found = figures("ref.npz", "samples.npz")
    assert (value(found, "Precision"), value(found, "Recall")) == (150, len("adm"))
    assert found[0]["FID"]["remark"] == ""
    assert found[0]["Recall"]["remark"] == "of 150 real images and 70 samples, adm distances"


def test_statistics_without_images_skip_what_needs_images_and_say_so(sets, figures, run_here, monkeypatch):
    run_here(evaluate, "ref.npz", "--save-stats", "stats.npz", "--device", "cpu")
    with np.load("stats.npz") as stats:
        np.savez("bare.npz", **{key: stats[key] for key in ("mu", "sigma", "mu_s", "sigma_s")})
        np.savez("pool.npz", mu=stats["mu"], sigma=stats["sigma"])
    plain = figures("ref.npz", "samples.npz")
    bare = figures("bare.npz", "samples.npz")
    assert value(bare, "FID-70") == pytest.approx(value(plain, "FID-70"), rel=1e-9)
    assert value(bare, "Precision") is None
    assert bare[0]["Recall"]["remark"] == "skipped: statistics without images in REF"
    assert "REF bare.npz: statistics of an unknown number of images" in bare[1]["said"]
    assert value(figures("pool.npz", "samples.npz"), "sFID") is None
    swapped = figures("ref.npz", "bare.npz")
    assert value(swapped, "FID") == pytest.approx(0, abs=1e-9)
    assert swapped[0]["Inception Score"]["remark"] == "skipped: statistics without images in SAMPLES"
    monkeypatch.setattr(extractors, "Inception", None)  # there is nothing to show it
    both = figures("bare.npz", "./bare.npz")
    assert "SAMPLES ./bare.npz is REF: the set is compared with itself" in both[1]["said"]
    assert "is compared with itself" not in swapped[1]["said"]
    assert value(both, "FID") == pytest.approx(0, abs=1e-9)
    assert both[0]["Precision"]["remark"] == "skipped: statistics without images in REF and SAMPLES"


def test_channels_equal_throughout_both_sets_are_counted_once(sets, figures):
    grey = [np.repeat(images[..., :1], 3, axis=3) for images in sets]
    for name, images in zip(("grey_ref.npz", "grey_samples.npz"), grey):
        np.savez(name, arr_0=images)
    once = value(figures("grey_ref.npz", "grey_samples.npz", "--weights", "none"), "FD-pixel32")
    flat = [images[..., 0].reshape(len(images), -1) / 127.5 - 1 for images in grey]
    assert once == pytest.approx(numpys_distance(*flat), rel=1e-5)
    flat = [images.transpose(0, 3, 1, 2).reshape(len(images), -1) / 127.5 - 1 for images in (grey[0], sets[1])]
    mixed = value(figures("grey_ref.npz", "samples.npz", "--weights", "none"), "FD-pixel32")
    assert mixed == pytest.approx(numpys_distance(*flat), rel=1e-4)
