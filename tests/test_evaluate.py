import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, run_script
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

import evaluate
from evaluation.image_sets import open_images
from training.datasets import load_dataset

sys.path.insert(0, str(ROOT / "benchmarks"))
import classifier as classifier_script
import evaluation_time

from evaluation import extractors, image_sets, metrics
from evaluation import figures as figure_list
from evaluation import survey as survey_module
from evaluation.extractors import INCEPTION, INCEPTION_SHA256, Classifier, Inception, inception_weights
from evaluation.image_sets import STATISTICS
from pipeline import checkpoint
from runtime.files import digest

SMALL = {"pool": ("mu", "sigma", 20), "spatial": ("mu_s", "sigma_s", 15)}


class SmallInception:
    """Random projections in the place of Inception's features."""

    def __init__(self, weights, device):
        draw = torch.Generator().manual_seed(0)
        self.weights = {name: torch.randn(192, width, generator=draw) / 10
                        for name, width in (("pool", 20), ("spatial", 15), ("logits", 9))}

    def __call__(self, images):
        x = images.flatten(1).float() / 127.5 - 1
        return {name: (x @ weight).tanh() for name, weight in self.weights.items()}


def draw_images(count, seed, size=8, spread=60):
    """Coloured noise around a gradient, (N, H, W, 3)."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(40, 200, size)[:, None, None]
    return (ramp + rng.normal(0, spread, (count, size, size, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """ref.npz of 150 images and samples.npz of 70, in the current folder; Inception is small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extractors, "Inception", SmallInception)
    monkeypatch.setattr(extractors, "inception_weights", lambda path: path)
    for module in (image_sets, figure_list):
        monkeypatch.setattr(module, "STATISTICS", SMALL)
    arrays = draw_images(150, 0), draw_images(70, 1, spread=40)
    np.savez("ref.npz", arr_0=arrays[0], arr_1=np.arange(150) % 10)
    np.savez("samples.npz", arr_0=arrays[1], arr_1=np.arange(70) % 10)
    return arrays


@pytest.fixture
def figures(run_here, tmp_path):
    """The figures of a run of evaluate.py, by name, and its report."""
    def run(*flags):
        result = run_here(evaluate, *flags, "--device", "cpu", "--json", tmp_path / "figures.json")
        assert result.returncode == 0, result.stderr
        report = json.loads((tmp_path / "figures.json").read_text())
        return {figure["name"]: figure for figure in report["figures"]}, report | {"said": result.stdout}
    return run


def value(found, name):
    return found[0][name]["value"]


# --- Inception's features ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    return evaluation_time.random_weights(tmp_path_factory.mktemp("inception"))


@pytest.fixture
def inception(inception_file):
    return Inception(inception_file, torch.device("cpu"))


@pytest.fixture(scope="session")
def theirs(inception_file):
    """torch-fidelity's own extractor: bias included in "logits"."""
    return FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased", "logits"],
                                       feature_extractor_weights_path=str(inception_file))


def test_pool_and_logits_are_torch_fidelitys_without_bias(inception, theirs):
    images = torch.from_numpy(draw_images(3, 0, size=20))
    found = inception(images)
    pool, unbiased, biased = theirs(images.permute(0, 3, 1, 2).contiguous())
    assert torch.allclose(found["pool"], pool, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found["logits"], unbiased, rtol=1e-4, atol=1e-5)
    assert (biased - unbiased).abs().max() > 0.05
    assert {name: features.shape[1] for name, features in found.items()} == {
        "logits": 1008} | {name: dimensions for name, (_, _, dimensions) in STATISTICS.items()}
    assert found["pool"].std(dim=0).mean() > 1e-3


def test_spatial_features_are_mixed_6ds_first_seven_channels_flattened_channels_last(inception):
    """Seen from its input on: convolution, batch norm with eps 0.001, ReLU; then by explicit indices."""
    seen = {}
    inception.network.Mixed_6c.register_forward_hook(lambda module, inputs, output: seen.update(x=output.clone()))
    found = inception(torch.from_numpy(draw_images(2, 0, size=12)))["spatial"]
    layer = inception.network.Mixed_6d.branch1x1
    planes = torch.einsum("oc,bchw->bohw", layer.conv.weight[:, :, 0, 0], seen["x"])
    planes = ((planes - layer.bn.running_mean.view(-1, 1, 1)) / (layer.bn.running_var.view(-1, 1, 1) + 0.001).sqrt()
              * layer.bn.weight.view(-1, 1, 1) + layer.bn.bias.view(-1, 1, 1)).clamp(min=0)
    assert found.shape == (2, 2023)
    assert 0.2 < (found > 0).float().mean() < 0.95
    for b, y, x, c in [(0, 0, 0, 0), (0, 0, 0, 6), (1, 0, 3, 2), (1, 16, 16, 6), (0, 9, 4, 5), (1, 3, 12, 1)]:
        assert found[b, (y * 17 + x) * 7 + c] == pytest.approx(planes[b, c, y, x].item(), rel=1e-3, abs=1e-4)


def test_planted_values_come_out_in_order(inception):
    planted = torch.arange(17 * 17 * 192.0).view(17, 17, 192).permute(2, 0, 1)[None]

    class Planted(torch.nn.Module):
        def forward(self, x):
            return planted.expand(len(x), -1, -1, -1)

    network = inception.network
    network.Mixed_6d.branch1x1 = Planted()
    network.Mixed_6d.branch1x1.register_forward_hook(inception._see)
    found = inception(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))["spatial"][0]
    assert found[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 192, 193]
    assert found[17 * 7].item() == 17 * 192


@pytest.mark.parametrize("size", [(32, 20), (310, 299)])
def test_the_network_sees_tensorflow_1s_resize(inception, size):
    """Bilinear, from pixel y * H / 299 without half a pixel's shift, no antialiasing: by a double loop."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8))
    seen = {}
    inception.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0].clone()))
    inception(images)
    assert seen["x"].shape == (1, 3, 299, 299)
    pixels = images[0].double()
    for i in range(0, 299, 7):
        for j in range(0, 299, 5):
            y, x = i * size[0] / 299, j * size[1] / 299
            top, left = int(y), int(x)
            bottom, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
            upper = pixels[top, left] + (pixels[top, right] - pixels[top, left]) * (x - left)
            lower = pixels[bottom, left] + (pixels[bottom, right] - pixels[bottom, left]) * (x - left)
            expected = (upper + (lower - upper) * (y - top) - 128) / 128
            assert torch.allclose(seen["x"][0, :, i, j].double(), expected, atol=1e-4)


@pytest.mark.slow
def test_all_figures_are_torch_fidelitys_on_the_same_network(figures, inception_file, theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", digest(inception_file))
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


# --- the figures ---------------------------------------------------------------------------------


def torch_fidelitys_precision_and_recall(real, fake):
    found = prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    return found["precision"], found["recall"]


def all_features(images):
    features = SmallInception(None, None)(torch.from_numpy(images))
    return {name: values.double().numpy() for name, values in features.items()}


def numpys_distance(a, b):
    """With numpy's covariances and the eigenvalues of their product."""
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(s_a @ s_b).astype(complex)).real.sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a) + np.trace(s_b) - 2 * root


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
    near = torch_fidelitys_precision_and_recall(*(torch.from_numpy(one["pool"]).float() for one in (real, fake)))
    assert (value(found, "Precision"), value(found, "Recall")) == pytest.approx(near, abs=1e-6)
    assert near[0] > near[1]  # the samples spread less
    theirs = [fid_features_to_statistics(torch.from_numpy(one["pool"])) for one in (real, fake)]
    theirs = fid_statistics_to_metric(*theirs, verbose=False)
    assert value(found, "FID-70") == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    theirs = isc_features_to_metric(torch.from_numpy(fake["logits"]), splits=2, shuffle=False)
    assert value(found, "Inception Score") == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert found[0]["FID-70"]["remark"] == "biased upwards, as N is below 50,000"
    assert "N = 70" in found[1]["said"]
    assert found[1]["peak_memory_gib"] > 0.1


def test_enough_samples_make_a_plain_fid(sets, figures, monkeypatch):
    monkeypatch.setattr(figure_list, "ENOUGH", 70)
    found = figures("ref.npz", "samples.npz")
    assert found[0]["FID"]["remark"] == ""
    assert "N = 70" in found[1]["said"]
    assert found[0]["Recall"]["remark"] == "of 150 real images and 70 samples, adm distances"


@pytest.mark.parametrize("precision", ["adm", "fp32"])
def test_distances_are_of_the_precision_asked_for(sets, figures, monkeypatch, precision):
    monkeypatch.setattr(figure_list, "precision_and_recall", lambda real, fake, given: (len(real), len(fake) + len(given)))
    found = figures("ref.npz", "samples.npz", *([] if precision == "adm" else ["--pr-precision", precision]))
    assert (value(found, "Precision"), value(found, "Recall")) == (150, 70 + len(precision))


def test_saved_statistics_give_the_same_figures_and_hold_images_evenly_spaced(sets, figures, run_here, monkeypatch):
    monkeypatch.setattr(image_sets, "REFERENCE_IMAGES", 50)
    result = run_here(evaluate, "ref.npz", "--save-stats", "stats.npz", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    with np.load("stats.npz") as stats:
        pool = all_features(sets[0])["pool"]
        assert stats["mu"] == pytest.approx(pool.mean(axis=0), rel=1e-6, abs=1e-7)
        assert stats["sigma"] == pytest.approx(np.cov(pool, rowvar=False), rel=1e-5, abs=1e-7)
        assert stats["sigma"].dtype == np.float64
        assert {key: stats[key].shape for key in stats} == {
            "arr_0": (50, 8, 8, 3), "mu": (20,), "sigma": (20, 20), "mu_s": (15,), "sigma_s": (15, 15), "n": ()}
        assert np.array_equal(stats["arr_0"], sets[0][::3])
    plain, from_stats = figures("ref.npz", "samples.npz"), figures("stats.npz", "samples.npz")
    for name in ("FID-70", "sFID-70", "Inception Score"):
        assert value(from_stats, name) == pytest.approx(value(plain, name), rel=1e-9)
    np.savez("third.npz", arr_0=sets[0][::3])
    assert value(from_stats, "Precision") == value(figures("third.npz", "samples.npz"), "Precision")
    assert "REF stats.npz: N = 50 of 8x8 (height x width), statistics of 150 images" in from_stats[1]["said"]
    assert from_stats[0]["Precision"]["remark"].startswith("of 50 real images and 70 samples")
    turned = figures("samples.npz", "stats.npz")[0]
    assert turned["FID-150"]["value"] == pytest.approx(value(plain, "FID-70"), rel=1e-9)
    assert turned["Inception Score"]["remark"] == "of 50 images"


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
    both = figures("bare.npz", "bare.npz")
    assert value(both, "FID") == pytest.approx(0, abs=1e-9)
    assert both[0]["Precision"]["remark"] == "skipped: statistics without images in REF and SAMPLES"


PATCHED = """import sys
sys.path[:0] = [{root!r}, {tests!r}]
import evaluate
from evaluation import extractors, figures, image_sets, metrics, survey
from runtime import cli
from test_evaluate import SMALL, SmallInception
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


# --- without Inception ---------------------------------------------------------------------------


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


@pytest.fixture(scope="session")
def digits_classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "digits.pt"
    args = classifier_script.build_parser().parse_args(
        ["--data-path", "digits", "--epochs", "5", "--out", str(path), "--device", "cpu"])
    classifier_script.main(args)
    return path


def save_digits(name, split, change=lambda images, labels: (images, labels)):
    digits = load_dataset("digits", split=split)
    images, labels = change(digits.images.permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy(), digits.labels.numpy())
    np.savez(name, arr_0=images, arr_1=labels)


def load_network(path):
    network = Classifier(num_classes=10)
    network.load_state_dict(checkpoint.load(path)["classifier"])
    return network.eval()


def test_the_classifier_reads_real_digits_and_tells_wrong_labels(digits_classifier, figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--weights", "none", "--classifier", digits_classifier]
    save_digits("right.npz", "val")
    save_digits("wrong.npz", "val", lambda images, labels: (images, (labels + (np.arange(len(labels)) < 90)) % 10))
    found = figures("digits", "right.npz", *flags)
    accuracy = value(found, "Label accuracy")
    assert 0.9 < accuracy < 1
    assert found[0]["Label accuracy"]["floor"] == pytest.approx(accuracy)  # measured by the script that trained it
    assert (found[0]["FD-classifier"]["value"], found[0]["FD-pixel32"]["value"]) == pytest.approx((0, 0), abs=1e-6)
    for name in ("FD-classifier", "Label accuracy"):
        assert digest(digits_classifier) in found[0][name]["remark"]
        assert f"test accuracy {accuracy:.4f}" in found[0][name]["remark"]
    with torch.no_grad(), np.load("wrong.npz") as file:
        logits = load_network(digits_classifier)(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1)
        expected = (logits.argmax(dim=1).numpy() == file["arr_1"]).mean()
    assert value(figures("digits", "wrong.npz", *flags), "Label accuracy") == expected
    assert expected < accuracy - 0.1
    noise = draw_images(450, 0)
    np.savez("noise.npz", arr_0=noise)
    found = figures("digits", "noise.npz", *flags)
    assert found[0]["FD-classifier"]["value"] > 10 * found[0]["FD-classifier"]["floor"]
    assert found[0]["Label accuracy"] | {"floor": 0} == {
        "name": "Label accuracy", "value": None, "remark": "skipped: no labels (arr_1) in SAMPLES", "floor": 0,
        "floor_of": "the classifier's test part, N = 450"}


def test_fd_classifier_is_of_its_features(digits_classifier, figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_digits("samples.npz", "train", lambda images, labels: (images[:300] // 2, labels[:300]))
    found = figures("digits", "samples.npz", "--weights", "none", "--classifier", digits_classifier)
    network = load_network(digits_classifier)
    real = load_dataset("digits", split="val").images.expand(-1, 3, -1, -1)
    fake = torch.from_numpy(np.load("samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = [network.features(images / 127.5 - 1).double().numpy() for images in (real, fake)]
    assert value(found, "FD-classifier") == pytest.approx(numpys_distance(*features), rel=1e-4)


def test_copies_of_training_images_are_found(figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_digits("copies.npz", "train", lambda images, labels: (images[5::7], labels[5::7]))
    found = figures("digits", "copies.npz", "--weights", "none", "--training-images", "digits")[0]
    train, held_out = (load_dataset("digits", split=split).images.flatten(1).double() / 127.5 - 1 for split in ("train", "val"))
    brute = (torch.cdist(held_out, train).amin(dim=1) / 8).median()
    median = found["Nearest training image, median"]
    assert median["value"] == pytest.approx(0, abs=1e-6)
    assert median["floor"] == pytest.approx(brute.item(), rel=1e-5)
    assert found["Nearer than 99 % of held-out"]["value"] == 1
    assert found["Nearer than 99 % of held-out"]["floor"] == pytest.approx(0.01, abs=0.005)
    save_digits("fair.npz", "val")
    fair = figures("digits", "fair.npz", "--weights", "none", "--training-images", "digits")[0]
    assert fair["Nearer than 99 % of held-out"]["value"] == pytest.approx(0.01, abs=0.005)
    save_digits("train.npz", "train")
    unfair = figures("train.npz", "fair.npz", "--weights", "none", "--training-images", "digits")[0]
    assert unfair["Nearer than 99 % of held-out"]["value"] is None
    assert "not held out" in unfair["Nearer than 99 % of held-out"]["remark"]


# --- wrong input ---------------------------------------------------------------------------------


def bad_files():
    """(name, contents)"""
    images = draw_images(9, 0)
    eye = np.eye(20)
    return {
        "no_images": dict(images=images, labels=np.arange(9)),
        "float": dict(arr_0=images / 255),
        "nchw": dict(arr_0=images.transpose(0, 3, 1, 2).copy()),
        "fortran": dict(arr_0=np.asfortranarray(images)),
        "objects": dict(arr_0=np.array([images, None], dtype=object)),
        "few": dict(arr_0=images[:3]),
        "large": dict(arr_0=draw_images(9, 0, size=16)),
        "sigma": dict(mu=np.zeros(20), sigma=np.eye(19), mu_s=np.zeros(15), sigma_s=np.eye(15)),
        "mu_only": dict(mu=np.zeros(20)),
        "nan": dict(mu=np.zeros(20), sigma=eye * np.nan),
        "crooked": dict(mu=np.zeros(20), sigma=np.triu(np.ones((20, 20)))),
        "object_n": dict(mu=np.zeros(20), sigma=eye, n=np.array([None])),
        "empty": {},
        "object_sigma": dict(mu=np.zeros(20), sigma=np.array([eye, None], dtype=object)),
        "bare": dict(mu=np.zeros(20), sigma=eye, mu_s=np.zeros(15), sigma_s=np.eye(15)),
    }


@pytest.mark.parametrize(("name", "words"), [
    ("no_images", ["no arr_0 among its arrays (images, labels)", "(N, H, W, 3) uint8"]),
    ("float", ["arr_0 is float64 (9, 8, 8, 3)", "expected uint8 (N, H, W, 3)"]),
    ("nchw", ["arr_0 is uint8 (9, 3, 8, 8)", "expected uint8 (N, H, W, 3)"]),
    ("fortran", ["Fortran order", "ascontiguousarray"]),
    ("objects", ["arr_0 is object (2,)"]),
    ("few", ["has 3 images", "at least 4"]),
    ("large", ["8x8", "16x16", "one size"]),
    ("sigma", ["mu is (20,) and sigma (19, 19)", "expected (20,) and (20, 20)"]),
    ("mu_only", ["mu, sigma and n cannot be read"]),
    ("nan", ["not finite"]),
    ("crooked", ["sigma is not symmetric"]),
    ("object_sigma", ["mu, sigma and n cannot be read"]),
    ("object_n", ["mu, sigma and n cannot be read"]),
    ("empty", ["no arr_0 among its arrays (none)"]),
])
@pytest.mark.parametrize("side", ["REF", "SAMPLES"])
def test_a_wrong_npz_is_one_line(sets, run_here, name, words, side):
    np.savez("bad.npz", **bad_files()[name])
    pair = ["bad.npz", "samples.npz"] if side == "REF" else ["ref.npz", "bad.npz"]
    where = [] if name == "large" else [f"{side} bad.npz"]
    assert_one_line(run_here(evaluate, *pair, "--device", "cpu"), *where, *words)


def test_a_damaged_npz_is_one_line(sets, run_here, tmp_path):
    content = (tmp_path / "samples.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    assert_one_line(run_here(evaluate, "ref.npz", "half.npz"), "SAMPLES half.npz", "truncated")
    with zipfile.ZipFile("short.npz", "w") as file:  # a header that promises more than there is
        np.save("whole.npy", sets[1])
        file.writestr("arr_0.npy", (tmp_path / "whole.npy").read_bytes()[:-50])
    result = run_here(evaluate, "ref.npz", "short.npz", "--device", "cpu")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "evaluate.py: error: SAMPLES short.npz is truncated or no .npz: arr_0 ends early"
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    result = run_here(evaluate, "ref.npz", "flipped.npz", "--device", "cpu")
    assert result.returncode == 2
    assert "Bad CRC-32" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(("flags", "words"), [
    (["ref.npz"], ["SAMPLES is missing", "--save-stats"]),
    (["ref.npz", "--save-stats", "s.npz", "--classifier", "c.pt"], ["SAMPLES is missing", "nothing else"]),
    (["ref.npz", "samples.npz", "--save-stats", "./samples.npz"], ["--save-stats", "overwrite"]),
    (["ref.npz", "samples.npz", "--training-images", "./ref.npz"], ["--training-images", "is REF", "held-out"]),
    (["nowhere.npz", "samples.npz"], ["REF nowhere.npz", "digits"]),
    (["ref.npz", "samples.npz", "--json", "figures.txt"], ["--json figures.txt", ".json"]),
    (["ref.npz", "samples.npz", "--json", "/proc/x/figures.json"], ["/proc/x"]),
    (["ref.npz", "--save-stats", "stats.npy"], ["--save-stats stats.npy", ".npz"]),
    (["ref.npz", "--save-stats", "s.npz", "--weights", "none"], ["--save-stats", "--weights none"]),
    (["bare.npz", "--save-stats", "s.npz"], ["--save-stats", "statistics already"]),
    (["bare.npz", "samples.npz", "--weights", "none"], ["REF bare.npz", "--weights none needs images"]),
    (["bare.npz", "samples.npz", "--training-images", "ref.npz"], ["REF bare.npz", "--training-images needs images"]),
    (["ref.npz", "samples.npz", "--pr-precision", "fp8"], ["--pr-precision"]),
    (["ref.npz", "samples.npz", "--classifier", "nowhere.pt"], ["--classifier nowhere.pt does not exist"]),
    (["ref.npz", "samples.npz", "--training-images", "elsewhere"], ["--training-images elsewhere"]),
    (["empty", "samples.npz"], ["REF empty", "no images"]),
    (["mixed", "samples.npz"], ["REF mixed", "one size", "a.png is 8x8", "b.png 9x8"]),
])
def test_wrong_flags_are_one_line(sets, run_here, tmp_path, flags, words):
    np.savez("bare.npz", **bad_files()["bare"])
    for folder in ("empty", "mixed"):
        (tmp_path / folder).mkdir()
    for name, width in (("a", 8), ("b", 9)):
        Image.new("RGB", (width, 8)).save(tmp_path / "mixed" / f"{name}.png")
    assert_one_line(run_here(evaluate, *flags, "--device", "cpu"), *words)
    assert not (tmp_path / "s.npz").exists()


def test_other_weights_are_one_line(tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", arr_0=draw_images(5, 0))
    (tmp_path / "w.pth").write_bytes(b"other")
    assert_one_line(run_here(evaluate, "x.npz", "x.npz", "--weights", "w.pth"), "--weights w.pth", INCEPTION,
                    INCEPTION_SHA256, digest(tmp_path / "w.pth"))
    assert_one_line(run_here(evaluate, "x.npz", "x.npz", "--weights", "v.pth"), "--weights v.pth is no file")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(extractors, "INCEPTION_URL", f"file://{tmp_path}/nowhere.pth")
    result = run_here(evaluate, "x.npz", "x.npz")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "cannot download" in result.stderr


def test_weights_are_found_in_the_cache_or_downloaded_to_it_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "server.pth").write_bytes(b"weights")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(extractors, "INCEPTION_URL", f"file://{tmp_path}/server.pth")
    with pytest.raises(OSError, match="incomplete"):
        inception_weights(None)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", digest(tmp_path / "server.pth"))
    path = inception_weights(None)
    assert path == tmp_path / "checkpoints" / INCEPTION
    (tmp_path / "server.pth").unlink()
    assert inception_weights(None) == path
    assert capsys.readouterr().out.count("Downloading") == 2


@pytest.mark.parametrize(("labels", "words"), [
    (np.array([None] * 9), ["arr_1 is object (9,)"]),
    (np.arange(8), ["arr_1 is int64 (8,)", "(9,)"]),
    (np.arange(9) / 2, ["arr_1 is float64 (9,)"]),
    (np.arange(2, 11), ["labels from 2 to 10", "0..9"]),
    (np.arange(-1, 8), ["labels from -1 to 7", "0..9"]),
])
def test_wrong_labels_are_one_line(digits_classifier, tmp_path, monkeypatch, run_here, labels, words):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", arr_0=draw_images(9, 0), arr_1=labels)
    flags = ["digits", "x.npz", "--weights", "none", "--device", "cpu"]
    assert_one_line(run_here(evaluate, *flags, "--classifier", digits_classifier), "SAMPLES x.npz", *words)
    assert run_here(evaluate, *flags).returncode == 0  # nothing there asks for labels


def test_other_classifiers_are_one_line(digits_classifier, tiny_run, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", arr_0=draw_images(5, 0, size=16))
    flags = ["x.npz", "x.npz", "--weights", "none", "--device", "cpu", "--classifier"]
    assert_one_line(run_here(evaluate, *flags, digits_classifier), "--classifier", "8x8", "16x16")
    assert_one_line(run_here(evaluate, *flags, checkpoint.latest(tiny_run)), "--classifier", "benchmarks/classifier.py")


def test_without_torch_fidelity_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[eval\]'"):
        Inception(None, torch.device("cpu"))


# --- sets of images ------------------------------------------------------------------------------


def test_an_npz_a_compressed_one_and_folders_hold_the_same_images(tmp_path):
    images = draw_images(11, 0)
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(11, dtype=np.int32))
    np.savez_compressed(tmp_path / "b.npz", arr_0=images)
    for i, image in enumerate(images):
        path = tmp_path / "folder" / f"class {i // 6}" / f"{i:02d}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    sets = [open_images(str(tmp_path / name), "REF") for name in ("a.npz", "b.npz", "folder")]
    for one in sets:
        assert (len(one), one.size) == (11, (8, 8))
        batches = [np.array(rows) for rows in ([0, 1, 5], [10], [3, 2])]
        for rows, found in zip(batches, one.read(batches)):
            assert np.array_equal(found, images[rows])
    assert sets[0].labels.tolist() == list(range(11))
    assert sets[1].labels is sets[2].labels is None


def test_a_named_set_is_its_held_out_part_in_colour_and_of_the_size_asked_for():
    digits = open_images("digits", "REF")
    own = load_dataset("digits", split="val")
    assert (len(digits), digits.size) == (450, (8, 8))
    (found,) = digits.read([np.array([4, 2])])
    assert np.array_equal(found[..., 1], own.images[[4, 2], 0].numpy())
    assert digits.labels.tolist() == own.labels.tolist()
    assert len(open_images("digits", "REF", split="train")) == 1347
    assert open_images("digits", "REF", size=(16, 16)).size == (16, 16)


# --- the classifier's training -------------------------------------------------------------------


def test_a_classifier_repeats_itself_and_wrong_flags_are_one_line(tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    flags = ["--data-path", "digits", "--epochs", 1, "--device", "cpu", "--out"]
    for name in ("a.pt", "b.pt"):
        assert run_here(classifier_script, *flags, name).returncode == 0
    a, b = (checkpoint.load(tmp_path / name)["classifier"] for name in ("a.pt", "b.pt"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert_one_line(run_here(classifier_script, *flags, "c.pt", "--epochs", 0), "--epochs 0")
    assert_one_line(run_here(classifier_script, *flags, "c.pth"), "--out c.pth", ".pt")
    assert_one_line(run_here(classifier_script, *flags, "c.pt", "--data-path", "nowhere"), "--data-path nowhere")


def test_shifted_and_mirrored_images_keep_their_content():
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(40, 1, 1, 1)
    shifts = set()
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        shifted = classifier_script.augment(x, False, draw)
        assert torch.equal(shifted[0], shifted[7])
        shifts.add(int(shifted[0, 0, 4, 4] - x[0, 0, 4, 4]))
    assert shifts == {8 * y + x for y in (-1, 0, 1) for x in (-1, 0, 1)}
    both = classifier_script.augment(x, True, torch.Generator().manual_seed(0))
    mirrored = [bool((image[0, :, 0] > image[0, :, 7]).all()) for image in both]
    assert 5 < sum(mirrored) < 35
