"""Heads on the features at the seam: their shapes and losses, and runs that have them."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_one_line, randomised, run_script, train_here
from PIL import Image
from test_train import assert_same, final, metrics
from torch import nn

import export
import sample
import sample_ddp
from diffusion import create_diffusion
from diffusion.guidance import guide
from models import DiNext, DiNextU, DiNextV3, DiT
from pipeline import checkpoint
from pipeline.autoencoders import load_autoencoder
from pipeline.encoders import load_encoder
from pipeline.generation import Sampling, generate, prepare
from pipeline.heads import (
    HEADS,
    Align,
    Head,
    Internal,
    Place,
    Step,
    Tap,
    WithHeads,
    backbone,
    check_heads,
    guided_inside,
    place_of,
    split_of,
)
from pipeline.weights import find_weights
from runtime import UserError
from runtime.pictures import to_unit_range
from small_models import MLP, ConvAdaLN
from training.runs import heads_of_run

COMMON = dict(input_size=(8, 16), in_channels=2, num_classes=3, learn_sigma=False)


def networks():
    torch.manual_seed(0)
    made = [DiT(hidden_size=32, depth=3, num_heads=2, patch_size=2, **COMMON),
            DiT(hidden_size=32, depth=3, num_heads=2, patch_size=2, adaln="single", class_token=True, **COMMON),
            DiNext(hidden_size=16, depth=3, patch_size=4, **COMMON), DiNextU(hidden_size=8, depths=(1, 1, 2, 1, 1), **COMMON),
            DiNextV3(hidden_size=16, depth=2, num_heads=2, attention_every=1, patch_size=4, **COMMON),
            ConvAdaLN(hidden_size=16, depth=3, **COMMON), MLP(hidden_size=32, label_features=8, **COMMON)]
    return [randomised(network) for network in made]


def batch():
    torch.manual_seed(1)
    return torch.randn(3, 2, 8, 16), torch.tensor([0.0, 400.0, 999.0]), torch.tensor([0, 2, 3])


def placed(network, **heads):
    """The network with an internal head with random weights."""
    split = split_of(network, heads)
    return WithHeads(network, {"internal": randomised(Internal(place_of(network, split, (3, 8, 16))))}, split)


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", networks(), ids=lambda network: type(network).__name__)
def test_the_prediction_is_the_backbone_s_and_a_head_sees_its_features(network):
    x, t, y = batch()
    model = placed(network)
    prediction, outputs = model(x, t, y)
    assert torch.equal(prediction, network(x, t, y))
    assert outputs["internal"].shape == x.shape
    others = [model(x, *other)[1]["internal"] for other in ((t + 1, y), (t, (y + 1) % 4))]
    assert all((outputs["internal"] - other).abs().max() > 1e-4 for other in others)  # by features and by c
    place = place_of(network, model.split, (3, 8, 16))
    grid = {DiT: (4, 8), DiNext: (2, 4), DiNextU: (2, 4), DiNextV3: (2, 4), ConvAdaLN: (8, 16), MLP: (1, 1)}[type(network)]
    assert (place.grid, place.patch) == (grid, (8 // grid[0], 16 // grid[1]))


def test_the_internal_head_is_dits_final_layer():
    """With the weights of the network's own last layer it gives what the network would from these features."""
    x, t, y = batch()
    for network in networks()[::2][:2]:  # DiT and DiNext
        model = placed(network)
        model.heads["internal"].final_layer.load_state_dict(network.final_layer.state_dict())
        c = network.condition(t, y)
        (features,) = network.encode(x, c, model.split)
        expected = network.unpatchify(network.final_layer(features, c))
        assert torch.equal(model(x, t, y)[1]["internal"], expected)


def test_pixels_of_a_patch_lie_where_they_belong():
    place = Place(width=5, condition_width=7, grid=(2, 3), patch=(2, 4), channels=3, rms_norm=False, images=(3, 4, 12))
    head = Internal(place)
    values = torch.arange(2 * 2 * 3 * 2 * 4 * 3.0).view(2, 2, 3, 2, 4, 3)  # (B, h, w, H/h, W/w, C)
    head.final_layer.forward = lambda features, c: values.flatten(3)
    out = head(None, None)
    assert out.shape == (2, 3, 4, 12)
    assert all(out[1, c, 2 * i + a, 4 * j + b] == values[1, i, j, a, b, c]
               for c in range(3) for i in range(2) for j in range(3) for a in range(2) for b in range(4))


def test_the_seam_is_a_third_of_the_blocks_or_a_us_middle():
    splits = [split_of(network, {}) for network in networks()]
    assert splits == [1, 1, 1, 4, 1, 1, 1]  # round(8/28 * 3); the U's four blocks down and in the middle
    with torch.device("meta"):
        assert split_of(DiT(), {}) == 8  # of 28
        assert split_of(DiNextU(depths=(3, 6, 12, 6, 3)), {}) == 21
    assert split_of(networks()[0], {"split": 2}) == 2
    with pytest.raises(UserError, match=r"split 3 is not in 1\.\.2"):
        split_of(networks()[0], {"split": 3})


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [dict(objective="flow"), dict(objective="v"), dict(objective="epsilon", learn_sigma=False),
                                     dict(objective="flow", prediction="x0"), dict()], ids=str)
def test_the_loss_of_the_internal_head_is_the_process_s_mse(process):
    process = create_diffusion("", **process)
    network = DiT(hidden_size=32, depth=3, num_heads=2, patch_size=2, **COMMON | {"learn_sigma": process.learn_sigma})
    model = placed(randomised(network))
    x, noise, y = batch()[0], torch.randn(3, 2, 8, 16), torch.tensor([0, 2, 3])
    t = process.sample_times(3, torch.Generator().manual_seed(0))
    tap = Tap(model)
    losses = process.training_losses(tap, x, t, dict(y=y), noise)
    assert torch.equal(losses["loss"], process.training_losses(network, x, t, dict(y=y), noise)["loss"])
    found = model.heads["internal"].loss(tap.outputs["internal"], Step(process, x, t, dict(y=y), noise, None))

    def weaker(x, t, y):
        out = model(x, t, y)[1]["internal"]
        return torch.cat([out, torch.zeros_like(out)], dim=1) if process.learn_sigma else out

    assert torch.equal(found, process.training_losses(weaker, x, t, dict(y=y), noise)["mse"])
    assert found.requires_grad


CLASSIFIER = f"classifier:{ROOT}/benchmarks/results/compare/classifier-cifar.pt"


@pytest.mark.parametrize(("grid", "kind"), [((8, 8), "mlp"), ((16, 16), "conv"), ((4, 4), "mlp")])
def test_alignment_is_repas_formula(grid, kind):
    """The negative mean over positions of the cosine, at the coarser of both grids; the encoder's is 8x8."""
    place = Place(width=5, condition_width=7, grid=grid, patch=(1, 1), channels=3, rms_norm=False, images=(3, 32, 32))
    head, images = randomised(Align(place, CLASSIFIER, kind, hidden_size=6)), torch.randint(0, 256, (2, 3, 32, 32)).byte()
    projected = head(torch.randn(2, *grid, 5), None)
    tokens, projection = load_encoder(CLASSIFIER, torch.device("cpu"))(images), projected
    if grid == (16, 16):
        projection = torch.stack([projected[:, a::2, b::2] for a in (0, 1) for b in (0, 1)]).mean(dim=0)
    if grid == (4, 4):
        tokens = torch.stack([tokens[:, a::2, b::2] for a in (0, 1) for b in (0, 1)]).mean(dim=0)
    cosines = [[nn.functional.normalize(z, dim=0) @ nn.functional.normalize(zt, dim=0) for z, zt in zip(*pair)]
               for pair in zip(projection.flatten(1, 2), tokens.flatten(1, 2))]
    expected = [-sum(of_image) / len(of_image) for of_image in cosines]
    found = head.loss(projected, Step(None, None, None, None, None, images))
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)
    names = {name.partition(".")[0] for name in head.state_dict()}
    assert names == {"projector"}  # the encoder is not saved
    assert copy.deepcopy(head).encoder is head.encoder


def test_a_weight_ends_with_its_step():
    assert [Head(0.5, 10).weight_at(step) for step in (0, 9, 10)] == [0.5, 0.5, 0.0]
    assert Head(0.5).weight_at(10**9) == 0.5


# --- internal guidance ---------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [dict(objective="flow"), {}], ids=str)
def test_internal_guidance_is_written_out(objective):
    """middle + W (final - middle) in its interval, before other guidance; the variance is the final one's."""
    process = create_diffusion("4", **objective)
    model = placed(randomised(DiT(hidden_size=32, depth=3, num_heads=2, patch_size=2,
                                  **COMMON | {"learn_sigma": process.learn_sigma})))
    x, t, y = batch()
    final, outputs = model(x, t, y)
    inside = guided_inside(model, 1.4, [True, False])
    out = inside(x, t, y)
    expected = outputs["internal"] + 1.4 * (final[:, :2] - outputs["internal"])
    assert torch.allclose(out[:, :2], expected, atol=1e-5)
    assert torch.equal(out[:, 2:], final[:, 2:])
    assert torch.equal(inside(x, t, y), final)  # outside of the interval
    guided = guide(guided_inside(model, 1.4, [True]), y, 3, 2.0, 2)(x, t)
    null = guided_inside(model, 1.4, [True])(x, t, torch.full_like(y, 3))
    assert torch.allclose(guided[:, :2], null[:, :2] + 2 * (expected - null[:, :2]), atol=1e-4)


# --- runs ----------------------------------------------------------------------------------------

RUN = [*TINY_RUN, "--model-args", '{"hidden_size": 32, "depth": 3}', "--diffusion-args", '{"objective": "flow"}',
       "--heads", '{"internal": {"weight": 0.25}}', "--max-steps", "6", "--run-name", "r"]


@pytest.fixture(scope="module")
def head_run(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("heads")
    train_here(cwd, *RUN, "--ckpt-every", "3", "--val-every", "3")
    return cwd / "results" / "r"


def test_the_loss_is_the_weighted_sum_and_heads_lie_apart(head_run):
    for loss, mse, internal in zip(*(metrics(head_run, name) for name in ("loss", "mse", "internal"))):
        assert loss == pytest.approx(mse + 0.25 * internal, rel=1e-5)
    state = final(head_run)
    assert state["model"].keys() == state["ema"].keys() == backbone(checkpoint.restore(head_run).model).state_dict().keys()
    assert {key.partition(".")[0] for part in ("model", "ema") for key in state["heads"][part]} == {"internal"}
    weights, average = (state["heads"][part]["internal.final_layer.linear.weight"] for part in ("model", "ema"))
    assert 0 < (weights - average).abs().max()
    assert state["spec"]["heads"] == {"split": 1, "internal": {"weight": 0.25}}
    assert find_weights(state, "x")[1] == ""  # nothing else could be meant
    assert all(value == value for value in metrics(head_run, "val_loss_ema"))


def test_without_weight_a_head_does_not_change_the_network(tmp_path):
    for name, flags in (("with", ["--heads", '{"internal": {"weight": 0.0}}']), ("without", ["--heads", "{}"])):
        train_here(tmp_path, *RUN, *flags, "--run-name", name)
    a, b = (final(tmp_path / "results" / name) for name in ("with", "without"))
    assert "heads" not in b
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in b[part])


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(head_run, tmp_path):
    broken = tmp_path / "results" / "r"
    shutil.copytree(head_run, broken)
    for path in (broken / "checkpoints").glob("0000006*"):
        path.unlink()
    train_here(tmp_path, *RUN, "--ckpt-every", "3", "--val-every", "3")
    assert_same(final(head_run), final(broken))
    for part, weights in final(head_run)["heads"].items():
        assert all(torch.equal(value, final(broken)["heads"][part][key]) for key, value in weights.items())


def test_heads_of_another_run_are_taken_at_the_same_seam_and_the_log_says_so(head_run, tmp_path):
    flags = ["--init-from", head_run, "--max-steps", 1, "--lr", 1e-12]
    train_here(tmp_path, *RUN, *flags)
    train_here(tmp_path, *RUN, *flags, "--run-name", "other", "--heads", '{"internal": {}, "split": 2}')
    train_here(tmp_path, *RUN, *flags, "--run-name", "none", "--heads", "{}")
    key, results = "internal.final_layer.linear.weight", tmp_path / "results"
    taken = final(results / "r")["heads"]["model"][key]
    assert torch.allclose(taken, final(head_run)["heads"]["ema"][key], atol=1e-6)
    assert taken.abs().max() > 1e-4
    assert "heads" not in final(results / "none")
    assert final(results / "other")["heads"]["model"][key].abs().max() < 1e-6
    for run, words in {"r": "fresh: none; unused: none", "other": "fresh: head internal; unused: head internal",
                       "none": "fresh: none; unused: head internal"}.items():
        assert words in (results / run / "log.txt").read_text()


def test_alignment_sees_the_pictures_as_they_are_mirrored_and_ends(photographs, tmp_path, monkeypatch, run_here):
    """Through a classifier; cached latents have no pictures."""
    import train

    seen, original = [], Align.loss
    monkeypatch.setattr(Align, "loss", lambda self, out, step: seen.append(step) or original(self, out, step))
    flags = ["--data-path", photographs / "train", "--image-size", 32, "--vae", "pixels", "--model", "DiNext-S/2",
             "--model-args", '{"hidden_size": 16, "depth": 2, "patch_size": 4}',
             "--diffusion-args", '{"objective": "flow"}', "--num-workers", 0, "--global-batch-size", 4, "--max-steps", 3,
             "--log-every", 1, "--preview-every", 0, "--run-name", "r", "--heads"]
    heads = {"align": {"encoder": CLASSIFIER, "kind": "conv", "stop_step": 2}}
    monkeypatch.chdir(tmp_path)
    done = run_here(train, *flags, json.dumps(heads))
    assert done.returncode == 0, done.stderr[-500:]
    assert all(torch.equal(to_unit_range(step.images), step.x_start) for step in seen)  # in pixels: the same flips
    logged = [metrics(tmp_path / "results/r", name) for name in ("loss", "mse", "align")]
    for step, (loss, mse, align) in enumerate(zip(*logged)):
        assert loss == pytest.approx(mse + (0.5 * align if step < 2 else 0), rel=1e-5)
    assert len(seen) == 2  # then the encoder does not run any more
    other = tmp_path / "other.pt"  # the same file is the same encoder, by any path; another one is not
    shutil.copy(CLASSIFIER.removeprefix("classifier:"), other)
    heads["align"]["encoder"] = f"classifier:{other}"
    assert run_here(train, *flags, json.dumps(heads), "--max-steps", 4).returncode == 0
    state = torch.load(other, weights_only=True)
    state["spec"]["test_accuracy"] = 0.5
    torch.save(state, other)
    assert_one_line(run_here(train, *flags, json.dumps(heads), "--max-steps", 5), "was trained with --heads", "not")
    wrong = run_here(train, *flags, json.dumps({"align": {"encoder": "classifier:none.pt"}}), "--run-name", "x")
    assert_one_line(wrong, "--heads: align: ", "none.pt")


def draw(ckpt, **given):
    restored = checkpoint.restore(ckpt)
    sampling = Sampling.of(restored.spec, {"num_sampling_steps": 4} | given, restored.model)
    prepare(restored, sampling, False)
    return generate(restored.model, load_autoencoder("pixels"), [1, 7], [0, 1], 0, sampling)


@pytest.fixture(scope="module")
def uneven(head_run, tmp_path_factory):
    """The run with larger weights of its head, so that guidance shows in a picture."""
    state, run = final(head_run), tmp_path_factory.mktemp("uneven") / "results" / "r"
    torch.manual_seed(0)
    state["heads"]["ema"] = {key: torch.randn_like(value) for key, value in state["heads"]["ema"].items()}
    checkpoint.save(run / "checkpoints" / "0000006.pt", state)
    return run


def test_pictures_with_internal_guidance(uneven, tmp_path, monkeypatch, run_here):
    """By the scripts: the file's name, the record and the PNG tell; W = 1 and an empty interval are the plain pictures."""
    plain, inside = draw(uneven), draw(uneven, internal_scale=1.4)
    assert not torch.equal(plain, inside)
    assert torch.equal(plain, draw(uneven, internal_scale=1.4, internal_interval=(0, 1)))
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", uneven, "--internal-scale", 1.4, "--internal-interval", 0, 700, "--num-sampling-steps", 4]
    assert run_here(sample, *flags, "--class-labels", "1 7").returncode == 0
    with Image.open("sample.png") as picture:
        assert (picture.text["internal_scale"], picture.text["internal_interval"]) == ("1.4", "[0.0, 700.0]")
    assert run_here(sample_ddp, *flags, "--num-fid-samples", 2, "--sample-dir", "s").returncode == 0
    (record,) = Path("s").glob("*-internal-1.4-0-700-heun-4-*.json")
    assert json.loads(record.read_text())["internal_scale"] == 1.4


def test_a_run_may_recommend_internal_guidance(tmp_path, monkeypatch, run_here):
    """Its preview is guided; a run that begins from it takes the recommendation only with the head."""
    import train

    monkeypatch.chdir(tmp_path)
    guided = ["--diffusion-args", '{"objective": "flow", "sampling": {"internal_scale": 1.5, "num_sampling_steps": 2}}']
    assert run_here(train, *RUN, *guided, "--max-steps", 1).returncode == 0
    with Image.open("results/r/previews/0000001.png") as picture:
        assert picture.text["internal_scale"] == "1.5"
    begin = [*TINY_RUN[:4], *TINY_RUN[8:], "--init-from", "results/r", "--max-steps", 1]
    for name, heads, scale in (("with", '{"internal": {}}', 1.5), ("without", "{}", 1.0)):
        done = run_here(train, *begin, "--run-name", name, "--heads", heads)
        assert done.returncode == 0, done.stderr[-300:]
        assert checkpoint.restore(f"results/{name}").spec.sampling.internal_scale == scale


def test_the_python_call_says_what_it_lacks(uneven):
    restored = checkpoint.restore(uneven)
    sampling = Sampling.of(restored.spec, {"internal_scale": 1.4}, restored.model)
    with pytest.raises(UserError, match=r"needs the network with its head: call prepare\(restored, sampling\) first"):
        generate(restored.model, load_autoencoder("pixels"), [1, 7], [0, 1], 0, sampling)


def test_an_exported_folder_has_the_head_that_sampling_may_use(uneven, tmp_path):
    def exported(run, name, *flags):
        export.main(export.build_parser().parse_args(["--ckpt", str(run), "--out", str(tmp_path / name), *flags]))
        return tmp_path / name

    plain, state = exported(uneven, "plain"), final(uneven)
    assert torch.equal(draw(plain, internal_scale=1.4), draw(uneven, internal_scale=1.4))
    assert not torch.equal(draw(plain), draw(plain, internal_scale=1.4))
    state["spec"]["sampling"]["internal_scale"] = 1.4
    checkpoint.save(tmp_path / "results/r/checkpoints/0000006.pt", state)
    run = tmp_path / "results/r"
    guided = exported(run, "guided")
    assert torch.equal(draw(guided), draw(uneven, internal_scale=1.4))
    digest = checkpoint.restore(guided).sha256()
    for path in guided.glob("heads.*"):
        path.unlink()
    assert checkpoint.restore(guided).sha256() != digest  # pictures depend on them
    with pytest.raises(UserError, match="has no weights of its heads"):
        draw(guided)
    with pytest.raises(UserError, match="--format diffusers has no internal guidance"):
        exported(run, "d", "--format", "diffusers")


def test_what_internal_guidance_does_not_go_with(uneven):
    with pytest.raises(UserError, match="`internal_scale` and `reuse` encoder cannot be combined; `internal_scale` 1 switches"):
        draw(uneven, internal_scale=2.0, reuse="encoder")
    with pytest.raises(UserError, match="`internal_scale` -1 is not a finite number"):
        draw(uneven, internal_scale=-1)
    with pytest.raises(UserError, match="`internal_interval` 5 3 is not LO HI"):
        draw(uneven, internal_scale=2.0, internal_interval=(5, 3))


@pytest.mark.slow
def test_two_processes_and_compile_agree_with_one_to_rounding(head_run, tmp_path, monkeypatch):
    run_script("train.py", *RUN, "--val-every", "3", "--grad-accum", "2", cwd=tmp_path, nproc=2)
    assert_same(final(head_run), final(tmp_path / "results" / "r"), tolerance=2e-5)
    calls, original = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(
        self, backend=lambda module, inputs: lambda *values: calls.append(0) or module.forward(*values), **options))
    torch._dynamo.reset()
    train_here(tmp_path, *RUN, "--compile", "--run-name", "c")
    assert len(calls) == 6
    assert metrics(tmp_path / "results" / "c", "loss") == pytest.approx(metrics(head_run, "loss"), rel=1e-5)


def test_what_is_refused(tmp_path, run_here, monkeypatch):
    import train

    def refused(*words, **changes):
        flags = {"heads": '{"internal": {}}', "diffusion_args": '{"objective": "flow"}'} | changes
        given = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value)]
        assert_one_line(run_here(train, *TINY_RUN, "--max-steps", 1, *given, "--results-dir", tmp_path), *words)

    refused("--heads: 'inner' is unknown; allowed: split, internal, align; did you mean internal", heads='{"inner": {}}')
    refused("--heads: internal: unknown key 'wait'; allowed: weight", heads='{"internal": {"wait": 1}}')
    refused("--heads: internal: weight -1.0 is not a finite number of at least 0", heads='{"internal": {"weight": -1}}')
    refused("--heads are not for objective 'flow-map'", diffusion_args='{"objective": "flow-map"}',
            model_args='{"time_scale": 0.01}')
    refused("--heads are for networks that are sampled from", model="Autoencoder-F4C8", diffusion_args="{}", model_args="{}",
            image_size="16")
    refused("--heads: internal needs a loss with an mse", diffusion_args='{"use_kl": true}')
    spec = SimpleNamespace(diffusion={}, model=SimpleNamespace(outline=lambda: networks()[0]))
    process, latents = SimpleNamespace(validation_terms=("mse",)), SimpleNamespace(kind="moments")
    assert heads_of_run({"internal": {}}, spec, process, latents) == {"split": 1, "internal": {"weight": 0.5}}
    with pytest.raises(UserError, match="align needs pictures, and `data_path` holds cached latents alone"):
        heads_of_run({"align": {}}, spec, process, latents)
    for name in ("mse", "loss", "lr", "keys", "a.b"):
        monkeypatch.setitem(HEADS, name, Internal)
        with pytest.raises(UserError, match=f"a head cannot have the name '{name}'"):
            heads_of_run({name: {}}, spec, process, latents)
    for heads, words in (({"split": 1}, "names none"), ({"internal": None}, "internal is None, not a dictionary"),
                         ({"internal": {}, "split": True}, "split True is not in 1..2")):
        with pytest.raises(UserError, match=words):
            heads_of_run(heads, spec, process, latents)
    with pytest.raises(UserError, match=r"Sequential lacks blocks, .* which heads need"):
        check_heads({"internal": {}}, nn.Sequential())
