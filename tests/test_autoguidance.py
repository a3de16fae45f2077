"""Autoguidance (--guide-ckpt) by `generate` and by the scripts; tests/test_guidance.py has its formula."""

import json
from dataclasses import replace

import numpy as np
import pytest
import sampling as benchmark
import torch
from conftest import assert_one_line, assert_same_images, random_network, run_script, save_random_checkpoint
from PIL import Image

import sample
import sample_ddp
from models import DiT
from pipeline import checkpoint, generation
from pipeline.autoencoders import Pixels
from pipeline.generation import Sampling, addressed_noise, generate
from pipeline.settings import SamplingSettings
from pipeline.spec import BareWeights
from runtime import UserError
from runtime.files import sha256
from runtime.pictures import to_uint8
from runtime.processes import World

SHAPE = dict(input_size=(8, 8), hidden_size=24, num_heads=2, patch_size=2)
DDP = ["--num-fid-samples", 7, "--num-sampling-steps", 3, "--device", "cpu", "--cfg-scale", 2]


def save_guide(path, run, **changes):
    """A checkpoint that can guide a run on digits: a DiT of one block and random weights."""
    kwargs = dict(in_channels=1, num_classes=10, depth=1, learn_sigma=False, **SHAPE)
    spec = checkpoint.load(checkpoint.resolve(run))["spec"]
    model = random_network(DiT, 0.15, changes.pop("seed", 0), **kwargs)
    checkpoint.save(path, {"ema": model.state_dict(), "spec": spec | changes | {
        "model": {"name": "DiT-S/2", "class": "DiT", "args": kwargs}}})
    return path


@pytest.fixture
def guide(tiny_run, tmp_path, monkeypatch):
    """guide.pt in the current folder, of another class and depth than the DiNext of tiny_run."""
    monkeypatch.chdir(tmp_path)
    return save_guide(tmp_path / "guide.pt", tiny_run)


@pytest.fixture
def pair(gaussian_run, tmp_path):
    """A network of two blocks, and one of three that can guide it."""
    restored = checkpoint.restore(gaussian_run)
    return restored, checkpoint.restore(save_random_checkpoint(tmp_path / "g.pt", 3, restored.spec.classes, depth=3))


def draw(restored, guide, **given):
    drawn = Sampling.of(restored.spec, given, restored.model, guide)
    return generate(restored.model, Pixels(), [3, 0, 1], range(3), 0, drawn)


# --- generate ------------------------------------------------------------------------------------


class Unconditional(torch.nn.Module):
    """A network that takes every label for the null label."""

    def __init__(self, model):
        super().__init__()
        self.model, self.in_channels, self.input_size, self.num_classes = model, 3, (8, 8), 5

    def forward(self, x, t, y):
        return self.model(x, t, torch.full_like(y, self.num_classes))


@pytest.mark.parametrize("given", [dict(), dict(sampler="heun", guidance_interval=(100, 700), cfg_channels=2)])
def test_images_are_those_of_classifier_free_guidance_if_the_guide_knows_no_label(pair, given):
    restored, guide = pair
    plain = draw(restored, None, **given)
    assert_same_images(draw(restored, replace(restored, model=Unconditional(restored.model)), **given), plain)
    assert not torch.equal(draw(restored, guide, **given), plain)


def test_calls_and_blocks_are_counted_in_both_networks(pair):
    restored, guide = pair
    given = dict(sampler="ddim", guidance_interval=(100, 700))  # of t 999, 666, 333, 0 guided at 666 and 333
    drawn, rows = Sampling.of(restored.spec, given, restored.model, guide), []
    for model in (restored.model, guide.model):
        for block in model.blocks:
            block.register_forward_hook(lambda block, inputs, out: rows.append(len(out)))
    generate(restored.model, Pixels(), [3, 0, 1], range(3), 0, drawn)
    assert drawn.model_calls == 4 + 2
    assert drawn.block_calls(restored.model) == sum(rows) / 3 == 2 * 4 + 3 * 2
    del guide.model.blocks
    assert drawn.block_calls(restored.model) is None


def test_a_flow_map_is_guided_by_the_mean_velocities_of_another(pair):
    """Two jumps, written out."""
    models = [random_network(DiT, 0.15, seed, in_channels=3, num_classes=5, depth=2, learn_sigma=False, time_scale=1e-3,
                             **SHAPE) for seed in (0, 1)]
    spec = replace(pair[0].spec, diffusion={"objective": "flow-map"}, sampling=SamplingSettings(
        sampler="map", num_sampling_steps=2, cfg_scale=2.5))
    restored, guide = (replace(pair[0], model=model, spec=spec) for model in models)
    x, y = addressed_noise(models[0], 0, range(3)), torch.tensor([3, 0, 1])
    with torch.no_grad():
        for t, r in ((1000.0, 500.0), (500.0, 0.0)):
            main, weaker = (model(x, torch.full((3,), t), y, r=torch.full((3,), r)) for model in models)
            x = x - 0.5 * (weaker + 2.5 * (main - weaker))
    images = draw(restored, guide)
    assert_same_images(images, to_uint8(x.clamp(-1, 1)))
    assert images.float().std() > 10


# --- what is refused -----------------------------------------------------------------------------


def test_a_guide_of_another_process_latents_autoencoder_or_classes_is_refused(pair):
    restored, guide = pair
    names = restored.spec.classes
    for changes, words in (
            (dict(diffusion={"objective": "v"}), "its objective is v, .* is epsilon"),
            (dict(diffusion={"noise_schedule": "squaredcos_cap_v2"}), "its noise_schedule is squaredcos_cap_v2, .* is linear"),
            (dict(diffusion={"input_scale": 0.5}), r"its input_scale is 0\.5, .* is 1\.0"),
            (dict(vae="mse"), "its vae is mse, .* is pixels; if .* pass one `vae` for both"),
            (dict(vae_sha256="ab"), "its vae_sha256 is ab, .* is None$"),
            (dict(latents_mean=[1.0], latents_std=[2.0]), r"its latents_mean and latents_std is .* is None"),
            (dict(classes=names[:4]), "its number of classes is 4, .* is 5"),
            (dict(classes=[*names[:4], "dog"]), "its class 4 is dog, .* is cat")):
        other = replace(guide, spec=replace(guide.spec, **changes))
        with pytest.raises(UserError, match=rf"^`guide_ckpt` .*g\.pt: {words}"):
            Sampling.of(restored.spec, {}, restored.model, other)
    guide.model.input_size = (8, 16)
    with pytest.raises(UserError, match=r"its latent shape is \(3, 8, 16\), .* is \(3, 8, 8\)$"):
        Sampling.of(restored.spec, {}, restored.model, guide)


def test_a_guide_whose_description_says_the_same_in_other_words_is_taken(pair):
    """Defaults written out, as diffusers' folders have them; an autoencoder that was moved; what only training depends on."""
    restored, guide = pair
    spec = replace(restored.spec, vae_sha256="ab", vae="results/vae")
    other = replace(spec, vae="moved/vae", diffusion={"objective": "epsilon", "noise_schedule": "linear", "input_scale": 1.0})
    assert Sampling.of(spec, {}, restored.model, replace(guide, spec=other)).guide
    trained = replace(spec, diffusion={"use_kl": True, "rescale_learned_sigmas": True, "learn_sigma": False})
    assert Sampling.of(spec, {}, restored.model, replace(guide, spec=trained)).guide


@pytest.mark.parametrize("script", [sample, sample_ddp, benchmark])
def test_wrong_guides_are_one_line_and_nothing_is_written(script, tiny_run, guide, tmp_path, run_here):
    guided = ["--cfg-scale", 2]
    (tmp_path / "empty").mkdir()
    other = save_random_checkpoint(tmp_path / "other.pt", 1, [str(i) for i in range(10)])
    before = sorted(tmp_path.iterdir())
    for ckpt, flags, words in (
            (guide, [], "--guide-ckpt needs a --cfg-scale other than 1"),
            (guide, [*guided, "--reuse", "encoder"], "--guide-ckpt and --reuse encoder cannot be combined"),
            (tiny_run, guided, "is the checkpoint itself: it must be a weaker one"),
            (other, guided, "--guide-ckpt other.pt: its objective is epsilon, that of the checkpoint to be guided is flow"),
            ("no.pt", guided, "error: --guide-ckpt no.pt does not exist"),
            ("empty", guided, "error: --guide-ckpt empty: the folder holds no")):
        ckpt = ckpt if ckpt == tiny_run else getattr(ckpt, "name", ckpt)
        assert_one_line(run_here(script, "--ckpt", tiny_run, "--guide-ckpt", ckpt, "--device", "cpu", *flags), words)
    assert sorted(tmp_path.iterdir()) == before


def test_without_label_drop_there_is_only_a_guide(tiny_run, pair):
    restored = checkpoint.restore(tiny_run)
    restored.facts["args"] = {"diffusion_args": {"label_drop": 0.0}}
    with pytest.raises(UserError, match="`cfg_scale` 2 needs a network trained with label_drop"):
        generation.prepare(restored, Sampling.of(restored.spec, {"cfg_scale": 2.0}))
    guided, guide = pair
    guided.facts["args"] = restored.facts["args"]
    generation.prepare(guided, Sampling.of(guided.spec, {"cfg_scale": 2.0}, guided.model, guide))
    generation.prepare(restored, Sampling.of(restored.spec, {"cfg_scale": 1.0}))


# --- the scripts ---------------------------------------------------------------------------------


def test_the_picture_and_the_line_name_the_guide(tiny_run, guide, run_here):
    flags = ["--ckpt", tiny_run, "--class-labels", "3 seven", "--cfg-scale", 2, "--num-sampling-steps", 2, "--device", "cpu"]
    assert run_here(sample, *flags, "--out", "plain.png").returncode == 0
    result = run_here(sample, *flags, "--guide-ckpt", "guide.pt", "--out", "guided.png")
    assert result.returncode == 0, result.stderr
    with Image.open("plain.png") as plain, Image.open("guided.png") as guided:
        assert guided.text == plain.text | {"guide": "guide", "guide_sha256": sha256(guide)}
        assert not np.array_equal(plain, guided)
    assert "for 6 calls of the model and 9 of its blocks" in result.stdout  # heun: 3 evaluations, 2 blocks and 1


@pytest.mark.parametrize("script", [sample, sample_ddp, benchmark])
def test_both_networks_are_made_fast(script, tiny_run, guide, run_here, monkeypatch):
    made = []
    monkeypatch.setattr(generation, "prepare_network", lambda model, *rest: made.append((type(model).__name__, *rest)))
    extra = {sample: [], sample_ddp: ["--num-fid-samples", 2], benchmark: ["--rows", "plain", "--repeats", 0]}[script]
    result = run_here(script, "--ckpt", tiny_run, "--guide-ckpt", guide, "--cfg-scale", 2, "--num-sampling-steps", 1,
                      "--precision", "bf16", "--compile", "--device", "cpu", *extra)
    assert result.returncode == 0, result.stderr
    assert made == [("DiNext", "bf16", True), ("DiT", "bf16", True)]


def test_an_output_names_its_guide_and_is_not_continued_with_another(tiny_run, guide, tmp_path, run_here):
    def run(*flags):
        return run_here(sample_ddp, "--ckpt", tiny_run, *DDP, *flags)

    assert run().returncode == 0
    assert run("--guide-ckpt", guide).returncode == 0
    plain, guided = sorted((tmp_path / "samples").glob("*.npz"), key=lambda path: "-autoguided-" in path.name)
    assert guided.name == plain.name.replace("fp32-", "fp32-autoguided-by-guide-")
    records = [json.loads(path.with_suffix(".json").read_text()) for path in (plain, guided)]
    assert records[1] == records[0] | {"guide": "guide", "guide_sha256": sha256(guide)}
    with np.load(plain) as first, np.load(guided) as second:
        assert not np.array_equal(first["arr_0"], second["arr_0"])
    save_guide(guide, tiny_run, seed=1)
    assert_one_line(run("--guide-ckpt", guide), "exists with other settings (guide_sha256 was", "--overwrite")


def test_a_bare_guide_is_described_by_its_shapes_not_by_the_flag_model(pair):
    world, bare = World(0, 1, torch.device("cpu")), BareWeights(model="DiT-XL/2")
    assert generation.restore_guide(world, None, bare) is None
    found = generation.restore_guide(world, str(pair[1].path), bare)  # not "--model DiT-XL/2 contradicts the checkpoint"
    assert len(found.model.blocks) == 3


def test_the_benchmark_guides_every_row(tiny_run, guide, run_here):
    result = run_here(benchmark, "--ckpt", tiny_run, "--guide-ckpt", guide, "--cfg-scale", 2, "--repeats", 0, "--out", "x.json")
    assert result.returncode == 0, result.stderr
    rows = json.loads((guide.parent / "x.json").read_text())["settings"]["rows"]
    assert list(rows) == ["heun-50", "interval", "ddim-50", "euler-50", "heun-10", "dpm++-20", "dpm++-15", "all-no-reuse"]
    assert {row["guide_sha256"] for row in rows.values()} == {sha256(guide)}
    assert (rows["euler-50"]["model_calls"], rows["euler-50"]["block_calls"]) == (100, 2 * 50 + 50)
    result = run_here(benchmark, "--ckpt", tiny_run, "--guide-ckpt", guide, "--cfg-scale", 2, "--repeats", 0, "--rows", "plain",
                      "--num-sampling-steps", 1)
    assert result.stdout.splitlines()[-1] == "plain: model_calls 2, block_calls 3"


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(tiny_run, guide, tmp_path, run_here):
    flags = ["--ckpt", tiny_run, "--guide-ckpt", guide, *DDP]
    assert run_here(sample_ddp, *flags, "--sample-dir", "one").returncode == 0
    run_script("sample_ddp.py", *flags, "--sample-dir", "two", "--per-proc-batch-size", 2, cwd=tmp_path, nproc=2)
    (one,), (two,) = (list((tmp_path / name).glob("*-autoguided-*.npz")) for name in ("one", "two"))
    with np.load(one) as first, np.load(two) as second:
        assert_same_images(first["arr_0"], second["arr_0"])
