import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_close, assert_one_line
from foreign import ForeignNet
from test_autoencoders import kl, ldm_names

import export
from diffusion import create_diffusion
from diffusion.flow import FlowMatching
from models import DiT, DiT_models
from pipeline import checkpoint, generation
from pipeline.autoencoders import load_autoencoder
from pipeline.generation import Sampling, addressed_noise, generate
from pipeline.settings import SamplingSettings
from pipeline.spec import ModelSpec, Spec
from runtime import UserError

NAMES = ["cat", "dog", "owl"]
ARGS = {  # tiny networks, one of each class
    "DiT-S/2": dict(hidden_size=32, depth=2, num_heads=4), "DiNext-S/2": dict(hidden_size=16, depth=2),
    "DiNextV3-S/2": dict(hidden_size=16, depth=2, num_heads=2, attention_every=1),
    "DiNext-U-S": dict(hidden_size=8, depths=(1, 1, 1, 1, 1)), "MLP": dict(hidden_size=64, label_features=8),
    "ConvAdaLN": dict(hidden_size=16, depth=2)}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    kl(folder, block_out_channels=4 * [8], norm_num_groups=4, scaling_factor=0.3, shift_factor=0.1,
       down_block_types=4 * ["DownEncoderBlock2D"], up_block_types=4 * ["UpDecoderBlock2D"])
    return str(folder)


def save(folder, vae, model="DiT-S/2", diffusion=None, sampling=None, image_size=(64, 64), statistics=None, **args):
    """A run's checkpoint of a network with random weights."""
    diffusion = diffusion or {}
    process, pixels = create_diffusion("", **diffusion), vae == "pixels"
    of_vae = load_autoencoder(vae).spec if vae.endswith("ae.pt") else {"vae": vae}
    size, channels = (8, 8), 1 if pixels else 8 if "vae_sha256" in of_vae else 4
    from_data = dict(input_size=size, in_channels=channels, num_classes=len(NAMES), learn_sigma=process.learn_sigma)
    settings = SamplingSettings.recommend(process, 0.1, dict(num_sampling_steps="4", cfg_scale=1.5) | (sampling or {}))
    spec = Spec(ModelSpec.of_preset(model, from_data | ARGS[model] | args), diffusion, classes=NAMES, sampling=settings,
                image_size=size if pixels else image_size, channels=1 if pixels else 3, **of_vae, **statistics or {})
    torch.manual_seed(1)
    network = spec.model.build()
    for name, value in network.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(value, std=0.1)
    path = folder / "results" / "run" / "checkpoints" / "0000007.pt"
    path.parent.mkdir(parents=True)
    state = {"ema": network.state_dict(), "spec": spec.to_dict(), "step": 7,
             "args": {"data_path": "animals", "global_batch_size": 64}}
    checkpoint.save(path, state)
    return path.parent.parent


def save_autoencoder(folder):
    """One of ours with random weights, whose images leave [-1, 1]."""
    torch.manual_seed(0)
    spec = Spec(ModelSpec.of_preset("Autoencoder-F4C8", dict(input_size=(32, 32), in_channels=3, hidden_size=8)), {}, "pixels",
                (32, 32), 3, NAMES, None)
    network = spec.model.build()
    torch.nn.init.normal_(network.decoder[-1].weight, std=0.2)
    path = folder / "ae.pt"
    checkpoint.save(path, {"ema": network.state_dict(), "spec": spec.to_dict()})
    return str(path)


def run_export(*flags):
    export.main(export.build_parser().parse_args(list(map(str, flags))))


def draw(ckpt):
    """Two images."""
    restored = checkpoint.restore(ckpt)
    autoencoder = load_autoencoder(restored.spec.vae, statistics=restored.spec.statistics)
    return generate(restored.model, autoencoder, [2, 0], [0, 1], 0, Sampling.of(restored.spec))


def test_an_exported_folder_loads_bit_equal(tmp_path, vae, capsys):
    run, folder = save(tmp_path, vae, "DiNext-U-S", {"objective": "flow"}), tmp_path / "out"
    run_export("--ckpt", run, "--out", folder)
    assert "README.md, config.json, model.safetensors, model.safetensors.sha256, vae" in capsys.readouterr().out
    before, after = checkpoint.restore(run), checkpoint.restore(folder)
    expected = before.spec.with_vae(str(folder / "vae")).to_dict()
    assert json.dumps(after.spec.to_dict()) == json.dumps(expected)  # as lists, where the run has tuples
    assert vae not in (folder / "config.json").read_text() + (folder / "README.md").read_text()
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.rglob("*"))  # others may read them
    assert torch.equal(draw(run), draw(folder))
    assert after.name == "out"
    shutil.rmtree(folder / "vae")
    with pytest.raises(OSError, match="out/vae"):
        draw(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    with pytest.raises(ValueError, match="is damaged: its sha256"):
        checkpoint.restore(folder)


def test_an_own_autoencoder_comes_along(tmp_path):
    ckpt = save(tmp_path, save_autoencoder(tmp_path), "DiNext-U-S", {"objective": "flow"}, image_size=(32, 32))
    out = tmp_path / "out"
    run_export("--ckpt", ckpt, "--out", out)
    expected = draw(ckpt)
    (tmp_path / "ae.pt").unlink()
    assert torch.equal(draw(out), expected)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"vae_sha256": "0" * 64}))  # it was trained further since
    for format in export.FORMATS:
        with pytest.raises(ValueError, match="has other weights than"):
            run_export("--ckpt", out, "--out", tmp_path / "other", "--format", format)
    assert not (tmp_path / "other").exists()
    run_export("--ckpt", out / "vae", "--out", tmp_path / "vae")  # an autoencoder alone
    assert "train.py --vae THIS_FOLDER" in (tmp_path / "vae" / "README.md").read_text()


def test_an_autoencoder_in_a_file_of_ldm_comes_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(ldm_names(kl(tmp_path / "kl").state_dict(), 2), "ldm.pt")
    run = save(tmp_path, "ldm.pt", image_size=(16, 16), statistics=dict(latents_mean=[0.1] * 4, latents_std=[2.0] * 4))
    expected = draw(run)
    run_export("--ckpt", run, "--out", "out")
    Path("ldm.pt").unlink()
    assert torch.equal(draw("out"), expected)


def test_a_folder_named_pixels_does_not_come_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pixels").mkdir()
    Path("pixels/private.png").touch()
    run_export("--ckpt", save(tmp_path, "pixels", model="MLP", diffusion={"learn_sigma": False}), "--out", "out")
    assert not Path("out/vae").exists()
    assert checkpoint.restore("out").spec.vae == "pixels"


def test_bare_weights_are_told_what_they_predict(tmp_path, monkeypatch):
    monkeypatch.setitem(DiT_models, "DiT-tiny", partial(DiT, patch_size=2, hidden_size=32, depth=2, num_heads=4))
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "DiT-XL-2-256x256.pt"
    torch.save(DiT_models["DiT-tiny"](input_size=8, num_classes=3).state_dict(), path)
    (tmp_path / "figures.json").write_text("{}")  # of something else
    run_export("--ckpt", path, "--out", tmp_path / "epsilon")
    card = (tmp_path / "epsilon" / "README.md").read_text()
    assert "assumed to predict epsilon" in card
    assert "license: unknown" in card  # not ours to say
    run_export("--ckpt", path, "--out", tmp_path / "sit", "--objective", "sit")
    assert checkpoint.restore(tmp_path / "sit").spec.diffusion == {"objective": "flow"}


def test_the_card_tells_data_steps_figures_and_shows_the_picture(tmp_path, vae):
    run = save(tmp_path, vae)
    (run / "previews").mkdir()
    for step in (3, 7, 9):
        (run / "previews" / f"{step:07d}.png").write_bytes(bytes([step]))
    figures = [dict(name="FID-5000", value=12.345678, floor=None, remark="biased upwards, as N is below 50,000")]
    (run / "figures.json").write_text(json.dumps({"figures": figures}))
    run_export("--ckpt", run, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: dinext\n")
    for words in ("Data: animals", "Steps: 7", "Batch: 64", "DiT-S/2 (DiT)", '"sampler": "ddpm"', "![samples](samples.png)",
                  "| FID-5000 | 12.35 | - | biased upwards, as N is below 50,000 |"):
        assert words in card
    assert (tmp_path / "out" / "samples.png").read_bytes() == bytes([7])  # 9 is of weights that came later


CASES = {
    "DiT, DDPM, learned variance, three guided channels": ("DiT-S/2", {}, dict(sampler="ddpm", cfg_channels=3)),
    "DiNext, DDIM, v": ("DiNext-S/2", {"objective": "v", "learn_sigma": False},
                        dict(sampler="ddim", num_sampling_steps="ddim4")),
    "DiNext-U, flow, Euler, interval": ("DiNext-U-S", {"objective": "flow"},
                                        dict(sampler="euler", guidance_interval=(300, 800))),
    "DiT, flow, Heun, pixels": ("DiT-S/2", {"objective": "flow"}, dict(sampler="heun")),
    "MLP, DDPM, v, pixels, small variance": ("MLP", {"objective": "v", "learn_sigma": False, "sigma_small": True},
                                             dict(sampler="ddpm")),
    "ConvAdaLN, x0, 400 steps": ("ConvAdaLN", {"objective": "x0", "learn_sigma": False, "diffusion_steps": 400},
                                 dict(sampler="dpm++")),
    "DiNext-U, thresholded pixels": ("DiNext-U-S", {"learn_sigma": False}, dict(sampler="dpm++", dynamic_thresholding=True)),
    "DiNext-U, DDPM, autoencoder of ours": ("DiNext-U-S", {"input_scale": 0.5, "sigma_small": True, "learn_sigma": False},
                                            dict(sampler="ddpm")),
    "DiT, cosine": ("DiT-S/2", {"noise_schedule": "squaredcos_cap_v2"}, dict(sampler="dpm++")),
    "DiT, flow map": ("DiT-S/2", {"objective": "flow-map"}, dict(sampler="map")),
    "DiNext-U, flow map, pixels, no guidance": ("DiNext-U-S", {"objective": "flow-map"}, dict(sampler="map", cfg_scale=1.0)),
    "DiT, flow map, thresholded pixels, interval": (
        "DiT-S/2", {"objective": "flow-map"}, dict(sampler="map", dynamic_thresholding=True, guidance_interval=(500, 800))),
    "DiT, flow map, Heun, pixels": ("DiT-S/2", {"objective": "flow-map"}, dict(sampler="heun")),
    "DiT, flow, x0": ("DiT-S/2", {"objective": "flow", "prediction": "x0"}, dict(sampler="euler")),
    "DiT, flow, x0, Heun, pixels, shift": ("DiT-S/2", {"objective": "flow", "prediction": "x0", "shift": 0.3},
                                           dict(sampler="heun")),
    "DiNext, flow, shift, interval that begins at one of its times": (
        "DiNext-S/2", {"objective": "flow", "shift": 3.0}, dict(sampler="euler", guidance_interval=(900, 1000))),
}


@pytest.fixture
def without_checkout(tmp_path, monkeypatch):
    """Calling it makes all modules of this checkout impossible to import."""
    from diffusers.utils import dynamic_modules_utils

    def leave():
        for name in list(sys.modules):
            if name.split(".")[0] in ("models", "small_models", "diffusion", "pipeline", "runtime", "exported"):
                monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(sys, "path", sys.path.copy())  # diffusers appends its cache of modules
        monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    return leave


def assert_diffusers_draws_the_same(run, out, monkeypatch, leave):
    """Export and draw what generate draws, from the folder alone; a flow in 3 steps and in 1 too. Returns the pipeline."""
    from diffusers import DiffusionPipeline
    from diffusers.schedulers import scheduling_ddpm

    run_export("--ckpt", run, "--out", out, "--format", "diffusers")
    restored, decoded = checkpoint.restore(run), []
    counts = [4, 3, 1] if restored.spec.diffusion.get("objective", "").startswith("flow") else [None]
    autoencoder = load_autoencoder(restored.spec.vae)
    to_uint8 = generation.to_uint8
    with monkeypatch.context() as patch:
        patch.setattr(generation, "to_uint8", lambda images: decoded.append(images) or to_uint8(images))
        for count in counts:
            given = {"num_sampling_steps": count} if count else {}
            generate(restored.model, autoencoder, [2, 0], [0, 1], 0, Sampling.of(restored.spec, given))
    noise = partial(addressed_noise, restored.model, 0, [0, 1])
    start, later = noise(), iter([noise(step) for step in range(4)])

    leave()
    pipe = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    with monkeypatch.context() as patch:
        patch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **options: next(later))
        for count, expected in zip(counts, decoded, strict=True):
            labels = [restored.spec.classes[2], 0]
            found = 2 * pipe(labels, latents=start, num_inference_steps=count, output_type="pt").images - 1
            assert (found - expected).norm() / expected.norm() < 1e-5
    return pipe


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers' schedulers with numpy 2
@pytest.mark.parametrize("case", CASES)
def test_diffusers_draws_what_generate_draws_without_this_checkout(tmp_path, vae, case, monkeypatch, without_checkout):
    """With only the folder: no module of this checkout can be imported."""
    model, diffusion, sampling = CASES[case]
    if own := "autoencoder of ours" in case:
        vae = save_autoencoder(tmp_path)
    run = save(tmp_path, "pixels" if "pixels" in case else vae, model, diffusion, sampling, (32, 32) if own else (64, 64))
    pipe = assert_diffusers_draws_the_same(
        run, tmp_path / "out", monkeypatch, lambda: (shutil.rmtree(tmp_path / "results"), without_checkout()))
    assert len(pipe(class_labels=[1], num_inference_steps=3).images) == 1  # another number of steps, and a picture
    with pytest.raises(ValueError, match=r"class_labels \[3\] are neither in 0\.\.2"):
        pipe(class_labels=[3])  # the null label


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_diffusers_draws_from_the_checkpoint_of_the_repository(tmp_path, monkeypatch, without_checkout):
    assert_diffusers_draws_the_same(ROOT / "configs" / "results" / "cifar-dinext-u", tmp_path / "out", monkeypatch,
                                    without_checkout)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_it_is_called_as_diffusers_pipelines_are(tmp_path, vae, monkeypatch):
    """Every form in the documentation of DiTPipeline and DDPMPipeline."""
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules[__name__], "NAMES", ["cat, tom", "dog", "owl, bird, tom"])
    run_export("--ckpt", save(tmp_path, vae), "--out", tmp_path / "out", "--format", "diffusers")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)

    def draw(*labels, **options):
        return pipe(*labels, **{"generator": torch.manual_seed(5), "output_type": "pt"} | options).images
    expected = draw([2])
    assert expected.shape == (1, 3, 64, 64)
    assert 0 <= expected.min() < 0.5 < expected.max() <= 1
    for labels in (2, "owl, bird, tom", "bird", ["owl"], (2,), torch.tensor(2), torch.tensor([2]), np.array([2]),
                   [np.int64(2)], [torch.tensor(2)]):
        assert torch.equal(draw(labels), expected), labels
    assert torch.equal(draw(class_labels=pipe.get_label_ids(["owl"]), guidance_scale=None), expected)
    assert pipe.labels == {"cat": 0, "dog": 1, "owl": 2, "bird": 2, "cat, tom": 0, "owl, bird, tom": 2}
    for wrong in ("tom", 3, [0, -1], 1.5):
        with pytest.raises((ValueError, TypeError)):
            draw(wrong)
    array = draw([2], output_type="np")
    assert array.dtype == np.float32
    assert np.array_equal(array, expected.permute(0, 2, 3, 1).numpy())
    (picture,) = draw([2], output_type="pil")
    assert np.abs(np.asarray(picture) - 255 * array[0]).max() <= 0.51
    with pytest.raises(ValueError, match="output_type 'jpeg' is none of pil, np, pt, latent"):
        draw([2], output_type="jpeg")
    assert torch.equal(pipe([2], 1.5, torch.manual_seed(5), 4, "pt", False)[0], expected)  # by position

    generators = [torch.Generator().manual_seed(i) for i in (4, 5)]
    assert torch.allclose(draw([1, 2], generator=generators)[1:], expected, atol=1e-5)
    with pytest.raises(ValueError, match="2 generators were given for 1 images"):
        draw([2], generator=generators)
    with pytest.raises(ValueError, match=r"latents have the shape \(2, 4, 8, 8\); expected \(1, 4, 8, 8\)"):
        draw([2], latents=torch.zeros(2, 4, 8, 8))
    for options, words in (
            ({"guidance_interval": (900, 100)}, r"`guidance_interval` 900 100 is not LO HI"),
            ({"guidance_interval": ()}, "is not LO HI"), ({"generator": []}, "generator is an empty list"),
            ({"class_labels": []}, "no image is asked for"),
            ({"latents": torch.full((1, 4, 8, 8), torch.nan), "output_type": "pil"}, "the images are not finite")):
        with pytest.raises(ValueError, match=words):
            draw(**{"class_labels": [2]} | options)
    assert len(pipe().images) == 1
    assert torch.equal(draw(None, batch_size=3), draw(None, batch_size=3))

    assert set(pipe.model_cpu_offload_seq.split("->")) < set(pipe.components)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)  # the learned variance is left out
    assert draw([2], num_inference_steps=3).isfinite().all()


def test_a_flow_map_with_another_scheduler_draws_as_a_flow(tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    run = save(tmp_path, "pixels", "MLP", {"objective": "flow-map"})
    run_export("--ckpt", run, "--out", tmp_path / "out", "--format", "diffusers")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    restored = checkpoint.restore(run)
    sampling = Sampling.of(restored.spec, {"sampler": "heun"})
    expected = generate(restored.model, load_autoencoder("pixels"), [2, 0], [0, 1], 0, sampling)
    found = pipe([2, 0], latents=addressed_noise(restored.model, 0, [0, 1])).images
    assert np.abs(np.stack(found).astype(int) - expected[..., 0].numpy()).max() <= 1


def test_no_folder_of_this_machine_is_in_the_export(tmp_path, vae):
    run = save(tmp_path, vae)
    state = checkpoint.load(checkpoint.latest(run))
    state["args"]["data_path"] = str(tmp_path / "photos" / "train")
    checkpoint.save(checkpoint.latest(run), state)
    for format in export.FORMATS:
        out = tmp_path / format
        run_export("--ckpt", run, "--out", out, "--format", format)
        assert "- Data: photos/train\n" in (out / "README.md").read_text()
        private = [str(Path(vae).parent), str(tmp_path)]
        assert not [path for path in out.rglob("*.*") if path.suffix in (".md", ".json", ".py")
                    and any(folder in path.read_text() for folder in private)]


def test_an_autoencoder_alone_is_a_component_of_diffusers(tmp_path, without_checkout):
    """Loaded as the card says."""
    path, out = save_autoencoder(tmp_path), tmp_path / "out"
    run_export("--ckpt", path, "--out", out, "--format", "diffusers")
    images, network = torch.rand(2, 3, 32, 32) * 2 - 1, load_autoencoder(path).network
    Path(path).unlink()
    without_checkout()
    code = re.search("```python(.*?)```", (out / "README.md").read_text(), flags=re.S)[1]
    names = {"images": images}
    exec(code.replace("THIS_FOLDER", str(out)), names)
    assert_close(names["latents"], network.encode(images))
    assert_close(names["images"], network.decode(names["latents"]))
    assert names["images"].abs().max() > 1  # as diffusers' own autoencoders, it does not clip


def test_code_of_another_file_is_refused_with_the_line_that_works(tmp_path, monkeypatch):
    monkeypatch.setitem(DiT_models, "Foreign", ForeignNet)
    monkeypatch.setattr(sys, "argv", ["mine.py export"])
    spec = ModelSpec.of_preset("Foreign", dict(num_classes=3))
    run = tmp_path / "my run.pt"
    stored = Spec(spec, {"objective": "flow"}, "pixels", (8, 8), 1, NAMES, SamplingSettings(sampler="euler"))
    checkpoint.save(run, {"ema": spec.build().state_dict(), "spec": stored.to_dict()})
    with pytest.raises(UserError, match=f"ForeignNet is of another file; .*: python mine.py export --ckpt '{run}' --out x"):
        run_export("--ckpt", run, "--out", "x", "--format", "diffusers")


def test_what_diffusers_cannot_draw_is_refused(tmp_path, vae):
    run = save(tmp_path, vae, "DiT-S/2", {"objective": "flow"}, dict(sampler="dpm++"))
    with pytest.raises(UserError, match=r"sampler dpm\+\+ with objective flow"):
        run_export("--ckpt", run, "--out", tmp_path / "out", "--format", "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["results"]  # nothing is left behind
    for sampler, steps, words in (("heun", "4", "sampler heun with objective epsilon"), ("ddim", "4", "divides 1000, not 4")):
        with pytest.raises(UserError, match=words):
            export.scheduler_of(SamplingSettings(sampler=sampler, num_sampling_steps=steps), create_diffusion(steps), {})
    for diffusion in ({"objective": "flow-map"}, {"objective": "flow", "prediction": "x0"}):
        for sampler in ("sde", "dpm++", "ddim"):
            words = f"sampler {re.escape(sampler)} with objective {diffusion['objective']}$"
            with pytest.raises(UserError, match=words):
                export.scheduler_of(SamplingSettings(sampler=sampler), create_diffusion("4", **diffusion), diffusion)
    registered = type("Curved", (FlowMatching,), {})()  # by docs/extending.md
    with pytest.raises(UserError, match="no form for a Curved; the default format takes it"):
        export.scheduler_of(SamplingSettings(sampler="euler"), registered, {"objective": "curved"})


def test_a_folder_is_pushed_to_the_branch(tmp_path, vae, monkeypatch, capsys):
    api = Mock()
    api.upload_folder.return_value = "URL"
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    flags, out = ["--ckpt", save(tmp_path, vae), "--push", "someone/animals", "--revision", "v2"], tmp_path / "out"
    run_export(*flags, "--out", out)
    api.create_branch.assert_called_once_with("someone/animals", branch="v2", exist_ok=True)
    api.upload_folder.assert_called_once_with(repo_id="someone/animals", folder_path=str(out), revision="v2")
    assert "Pushed to URL" in capsys.readouterr().out
    api.create_repo.side_effect = RuntimeError("401 Client Error: Unauthorized\nlong story")  # of any client
    with pytest.raises(OSError, match=r"refused someone/animals: 401 Client Error: Unauthorized; .*out2 is complete"):
        run_export(*flags, "--out", tmp_path / "out2")


def test_a_repository_of_the_hub_is_read_from_its_cache(tmp_path, vae, monkeypatch):
    run, repository, commit = save(tmp_path, vae), tmp_path / "hub" / "models--someone--animals", "0123456" + "a" * 33
    for folder in ("snapshots", "refs"):
        (repository / folder).mkdir(parents=True)
    run_export("--ckpt", run, "--out", repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    expected = checkpoint.restore(run).model.pos_embed
    for name, revision in (("someone/animals", "main"), ("someone/animals@v2", "v2")):
        (repository / "refs" / revision).write_text(commit)
        restored = checkpoint.restore(name)
        assert restored.name == "someone--animals-0123456"
        assert torch.equal(restored.model.pos_embed, expected)
    with pytest.raises(OSError, match=r"someone/others .*hub's cache"):
        checkpoint.restore("someone/others")


def test_wrong_flags_are_one_line(tmp_path, run_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, words in ((["--out", tmp_path], f"--out {tmp_path} exists; name a new folder"),
                         (["--out", "new", "--revision", "v2"], "--revision names the branch of --push"),
                         (["--out", "new", "--push", "not a repo/!!"], "--push not a repo/!! is not"),
                         (["--out", "new/er"], "--ckpt x.pt does not exist")):
        assert_one_line(run_here(export, "--ckpt", "x.pt", *flags), words)
    assert list(tmp_path.iterdir()) == []
