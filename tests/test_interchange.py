import argparse
import copy
import json
import math
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import sample
from diffusion.guidance import guide
from models import DiT, DiT_models
from pipeline import checkpoint, interchange, published
from pipeline.autoencoders import load_autoencoder
from pipeline.generation import Sampling, prepare
from pipeline.interchange import interpret
from pipeline.spec import BareWeights, Source
from runtime import UserError, files

TINY = dict(patch_size=2, hidden_size=32, depth=3, num_heads=4)


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(DiT_models, "DiT-tiny", partial(DiT, **TINY))  # the other registries are views of it


def random_weights(learn_sigma: bool, **changes) -> dict:
    torch.manual_seed(1)
    model = DiT(**TINY | dict(input_size=8, num_classes=10, learn_sigma=learn_sigma) | changes)
    return {key: value if key == "pos_embed" else torch.randn_like(value) * 0.2 for key, value in model.state_dict().items()}


def written_out(w: dict, x, t, y, heads: int = TINY["num_heads"], depth: int = TINY["depth"], p: int = TINY["patch_size"],
                r=None, split: int | None = None, last: str = "final_layer"):
    """SiT's, REPA's, DMF's, IG's and LightningDiT's networks from their papers and DiT's: (B, C or 2C, H, W).

    t is embedded as it is. With r and a split it is DMF's: the blocks after the split, and the last layer, see r. With a
    smaller depth and another last layer it is IG's weaker output.
    """
    lightning = "blocks.0.mlp.w12.weight" in w

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def modulated(x, shift, scale, norm):
        if lightning:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{norm}.weight"]
        else:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * (1 + scale[:, None]) + shift[:, None]

    def turned(q):
        """Rotary positions, by complex numbers: pairs of a head's first half turn with the row, the others with the column."""
        pairs = torch.view_as_complex(q.unflatten(-1, (-1, 2)))  # (B, heads, N, d / 2)
        quarter = q.shape[-1] // 4
        speeds = torch.tensor([10_000 ** (-i / quarter) for i in range(quarter)])
        row, column = torch.arange(height // p).repeat_interleave(width // p), torch.arange(width // p).repeat(height // p)
        angles = torch.cat([row[:, None] * speeds, column[:, None] * speeds], dim=1)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def condition(t):
        angles = t[:, None] * torch.tensor([10_000 ** (-i / 128) for i in range(128)])
        c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))))
        return F.silu(c + w["y_embedder.embedding_table.weight"][y])

    c = condition(t)
    b, _, height, width = x.shape
    x = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p).flatten(2).mT + w["pos_embed"]
    for i in range(depth):
        block, c = f"blocks.{i}", condition(r) if i == split else c
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(f"{block}.adaLN_modulation.1", c).chunk(6, dim=1)
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2)
                   for part in linear(f"{block}.attn.qkv", modulated(x, shift_a, scale_a, f"{block}.norm1")).chunk(3, dim=2))
        for kind in ("weight", "scale"):
            if f"{block}.attn.q_norm.{kind}" in w:
                q, k = (z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{block}.attn.{name}_norm.{kind}"]
                        for z, name in ((q, "q"), (k, "k")))
        if lightning:
            q, k = turned(q.contiguous()), turned(k.contiguous())
        attended = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
        x = x + gate_a[:, None] * linear(f"{block}.attn.proj", attended.transpose(1, 2).flatten(2))
        h = modulated(x, shift_m, scale_m, f"{block}.norm2")
        if lightning:
            gate, value = linear(f"{block}.mlp.w12", h).chunk(2, dim=2)
            h = linear(f"{block}.mlp.w3", F.silu(gate) * value)
        else:
            h = linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", h), approximate="tanh"))
        x = x + gate_m[:, None] * h
    modulation = linear(f"{last}.adaLN_modulation.1", c).chunk(2, dim=1)
    x = linear(f"{last}.linear", modulated(x, *modulation, f"{last}.norm_final"))
    x = x.view(b, height // p, width // p, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, -1, height, width)


def batch():
    torch.manual_seed(2)
    return torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.37, 0.99]), torch.tensor([1, 9, 10])


def read(weights, bare=BareWeights(), **flags):
    return interpret(Source("published.pt", weights, {"args": argparse.Namespace(**flags)} if flags else {}), bare)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_sits_and_repas_networks_are_ours(tmp_path):
    """SiT: x_s = s x_1 + (1 - s) x_0 from noise x_0 to data x_1; u = x_1 - x_0. Ours: noise - data at t = 1 - s."""
    path, (x, t, y) = tmp_path / "published.pt", batch()
    weights = random_weights(learn_sigma=True)
    torch.save(weights, path)
    ours = checkpoint.restore(path, BareWeights("DiT-tiny", 64, 10, objective="sit"))
    assert_equal(ours.model(x, 1000 * (1 - t), y), -written_out(weights, x, t, y)[:, :4])
    sampling = ours.spec.sampling
    assert (sampling.sampler, sampling.num_sampling_steps, sampling.cfg_channels) == ("heun", "125", 3)

    weights = random_weights(learn_sigma=False)
    torch.save({"ema": weights | {"projectors.0.0.weight": torch.ones(3, 3)}}, path)  # nobody says that it is REPA's
    ours = checkpoint.restore(path, BareWeights("DiT-tiny", 64, 10))
    assert_equal(ours.model(x, 1000 * t, y), written_out(weights, x, t, y))
    sampling = ours.spec.sampling
    assert (sampling.sampler, sampling.cfg_scale, sampling.guidance_interval) == ("euler", 1.8, (0, 700))
    assert sampling.cfg_channels is None


def test_the_flags_of_a_trainer_tell_what_it_trained():
    weights = random_weights(learn_sigma=True)
    sit = dict(model="SiT-tiny", image_size=64, num_classes=10, path_type="Linear", prediction="velocity", vae="ema")
    spec = read(weights, **sit).spec
    assert (spec.model.name, spec.model.args["time_scale"], spec.vae) == ("DiT-tiny", 1e-3, "ema")
    assert spec.diffusion == {"objective": "flow"}
    with pytest.raises(UserError, match="path_type is GVP; only linear"):
        read(weights, **sit | dict(path_type="GVP"))
    repa = dict(model="SiT-tiny", resolution=64, num_classes=10, path_type="linear", prediction="v", qk_norm=False)
    spec = read(weights, **repa).spec
    assert (spec.image_size, spec.sampling.cfg_scale) == ((64, 64), 1.8)  # not SiT's


def test_dmfs_network_is_ours(tmp_path):
    """u(x, t, r), times on 0..1, 1 = noise; its last blocks see r. Published: x_r = x_t + (r - t) u, four steps."""
    path, (x, t, y), r = tmp_path / "published.pt", batch(), torch.tensor([0.0, 0.1, 0.5])
    weights = random_weights(learn_sigma=False)
    torch.save(weights | {"logvar_linear.weight": torch.ones(1, 256), "logvar_linear.bias": torch.ones(1)}, path)
    ours = checkpoint.restore(path, BareWeights("DiT-tiny", 64, 10))
    assert_equal(ours.model(x, 1000 * t, y, 1000 * r), written_out(weights, x, t, y, r=r, split=2))  # of 3, as 20 of 28
    assert_equal(ours.model(x, 1000 * t, y), written_out(weights, x, t, y))
    sampling = ours.spec.sampling
    assert (sampling.sampler, sampling.num_sampling_steps, sampling.cfg_scale) == ("map", "4", 1.0)
    assert sampling.cfg_channels is None
    noise = torch.randn(3, 4, 8, 8)
    steps = Sampling.of(ours.spec, {"num_sampling_steps": 2})
    *_, last = steps.solver(steps.process, guide(ours.model, y, 10, 1.0, 4), noise, None)
    middle = noise + (0.5 - 1) * written_out(weights, noise, torch.ones(3), y, r=torch.full((3,), 0.5), split=2)
    expected = middle + (0 - 0.5) * written_out(weights, middle, torch.full((3,), 0.5), y, r=torch.zeros(3), split=2)
    assert_equal(last["sample"], expected)

    weights = random_weights(learn_sigma=False, qk_norm=True)
    theirs = {key.replace("_norm.weight", "_norm.scale"): value for key, value in weights.items()}
    assert any(key.endswith("k_norm.scale") for key in theirs)
    torch.save(theirs, path)  # without the part that tells
    ours = checkpoint.restore(path, BareWeights("DiT-tiny", 64, 10, objective="dmf"))
    assert_equal(ours.model(x, 1000 * t, y, 1000 * r), written_out(theirs, x, t, y, r=r, split=2))
    trainer = dict(model="DMFT-tiny", resolution=64, num_classes=10, dmf_depth=1, qk_norm=True, path_type="linear")
    spec = read(theirs, **trainer).spec
    assert (spec.model.name, spec.model.args["map_split"], spec.diffusion) == ("DiT-tiny", 1, {"objective": "flow-map"})
    with torch.device("meta"):
        weights = DiT_models["DiT-XL/2"](input_size=16, num_classes=7, learn_sigma=False).state_dict()
    assert read(weights, BareWeights(objective="dmf")).spec.model.args["map_split"] == 20
    assert read(theirs, **trainer | dict(resolution=512)).spec.diffusion == {"objective": "flow-map", "shift": 1.5}  # published


def with_second_output(weights):
    """The weights of internal guidance: a final layer more."""
    torch.manual_seed(3)
    return weights | {key.replace("final_layer", "final_layer_xr"): torch.randn_like(value) * 0.2
                      for key, value in weights.items() if key.startswith("final_layer.")}


def assert_guided_inside(ours, weights, sign, reverse, p):
    """One Euler step from noise with internal guidance alone: x - (xr + scale (v - xr)), where v is noise - data."""
    noise, y = torch.randn(3, ours.model.in_channels, 8, 8), torch.tensor([1, 9, 10])
    sampling = Sampling.of(ours.spec, {"sampler": "euler", "num_sampling_steps": 1, "cfg_scale": 1.0})
    scale = sampling.settings.internal_scale
    assert scale == 1.4
    prepare(ours, sampling)
    time = torch.full((3,), 0.0 if reverse else 1.0)
    final, weak = (sign * written_out(weights, noise, time, y, p=p, **which)
                   for which in (dict(depth=10), dict(depth=8, last="final_layer_xr")))
    predict = guide(sampling.called(ours.model, 3), y, 10, 1.0, noise.shape[1])
    *_, last = sampling.solver(sampling.process, predict, noise, None)
    assert_equal(last["sample"], noise - weak - scale * (final - weak))


def test_internal_guidances_networks_are_ours(tmp_path, monkeypatch):
    """SiT's flow on REPA's time, with 1 = noise; LightningDiT's, with 1 = data. Both have `final_layer_xr` after block 8."""
    lightning = dict(patch_size=1, in_channels=3, lightning=True, qk_norm=True)
    for name, args in {"DiT-tiny": {}, "LightningDiT-tiny": lightning}.items():
        monkeypatch.setitem(DiT_models, name, partial(DiT, **TINY | dict(depth=10) | args))
    path, weights = tmp_path / "ig.pt", with_second_output(random_weights(learn_sigma=False, depth=10))
    trainer = argparse.Namespace(model="SiT-tiny", resolution=64, num_classes=10, path_type="linear")
    torch.save({"ema": weights, "args": trainer}, path)
    ours = checkpoint.restore(path)
    x, t, y = batch()
    assert_equal(ours.model(x, 1000 * t, y), written_out(weights, x, t, y, depth=10))
    sampling = ours.spec.sampling
    assert (sampling.sampler, sampling.num_sampling_steps, sampling.cfg_scale) == ("sde", "250", 1.35)
    assert (sampling.cfg_channels, sampling.guidance_interval) == (None, (0, 700))
    assert_guided_inside(ours, weights, 1, False, TINY["patch_size"])
    bare = BareWeights(objective="ig", model="DiT-tiny", image_size=64, num_classes=10)
    assert read(weights, bare).spec == ours.spec
    with pytest.raises(UserError, match=r"no head of internal guidance, whose tensors begin with final_layer_xr\."):
        read({key: value for key, value in weights.items() if "_xr" not in key}, bare)

    weights = with_second_output(random_weights(learn_sigma=False, depth=10, **lightning))
    weights = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for key, value in weights.items()}
    torch.save({"ema": weights}, path)
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3)}, tmp_path / "latents_stats.pt")
    ours = checkpoint.restore(path, BareWeights("LightningDiT-tiny"))
    assert_guided_inside(ours, weights, -1, True, 1)
    sampling = ours.spec.sampling
    assert (sampling.sampler, sampling.cfg_scale, sampling.guidance_interval) == ("heun", 1.45, (0, 810))


def test_what_is_assumed_is_said_and_what_contradicts_the_file_is_refused():
    weights = random_weights(learn_sigma=True)
    assert "assumed to predict epsilon" in read(weights, BareWeights("DiT-tiny", 64, 10)).remark
    assert read(weights, BareWeights("DiT-tiny", 64, 10, objective="epsilon")).remark == ""
    with pytest.raises(UserError, match="`objective` epsilon contradicts the file, whose format is REPA"):
        read(weights | {"projectors.0": torch.ones(1)}, BareWeights("DiT-tiny", 64, 10, objective="epsilon"))
    with pytest.raises(UserError, match="`model` MLP is not a DiT"):
        read(weights, BareWeights("MLP", 64, 10, objective="sit"))


def test_presets_are_known_by_their_shapes():
    """Bare weights need neither model, image size nor number of classes."""
    with torch.device("meta"):
        weights = DiT_models["DiT-S/4"](input_size=16, num_classes=7).state_dict()
    spec = read(weights, BareWeights()).spec
    assert (spec.model.name, spec.image_size, len(spec.classes)) == ("DiT-S/4", (128, 128), 7)
    assert published.preset_of(dict(depth=28, hidden_size=1152, patch_size=1)) == "DiT-XL/2"  # not a LightningDiT


@pytest.fixture
def lightning(monkeypatch, tmp_path):
    """A file as published: the weights, and latents_stats.pt beside it."""
    args = dict(patch_size=1, lightning=True, qk_norm=True)
    monkeypatch.setitem(DiT_models, "LightningDiT-tiny", partial(DiT, **TINY | args))
    weights = random_weights(learn_sigma=False, in_channels=3, **args)
    weights = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for key, value in weights.items()}
    torch.save({"ema": weights | {"feat_rope.freqs_cos": torch.ones(64, 8)}}, tmp_path / "lightning.pt")
    statistics = {"mean": torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1), "std": torch.tensor([4.0, 5, 6]).view(1, 3, 1, 1)}
    torch.save(statistics, tmp_path / "latents_stats.pt")
    return tmp_path / "lightning.pt", weights


def test_lightningdits_network_is_ours(lightning):
    path, weights = lightning
    ours = checkpoint.restore(path, BareWeights("LightningDiT-tiny"))
    _, s, y = batch()
    x = torch.randn(3, 3, 8, 8)
    assert_equal(ours.model(x, 1000 * (1 - s), y), -written_out(weights, x, s, y, p=1))  # SiT's flow
    spec, sampling = ours.spec, ours.spec.sampling
    assert (spec.image_size, len(spec.classes), spec.statistics) == ((128, 128), 10, ([1, 2, 3], [4, 5, 6]))
    assert (sampling.sampler, sampling.cfg_scale, sampling.cfg_channels) == ("euler", 6.7, 3)
    assert sampling.guidance_interval == (0, 875)
    theirs = [0.3 * u / (1 + (0.3 - 1) * u) for u in (0, 0.25, 0.5, 0.75, 1)]  # the published shift; 1 = data
    assert Sampling.of(spec, {"num_sampling_steps": 4}).process.grid == pytest.approx([1 - u for u in theirs])


def test_a_lightningdit_without_what_it_needs_is_refused(lightning):
    path, _ = lightning
    with pytest.raises(UserError, match="is of another architecture"):
        checkpoint.restore(path)  # as LightningDiT-XL/1
    (path.parent / "latents_stats.pt").unlink()
    with pytest.raises(UserError, match=r"latents_stats\.pt is missing beside it"):
        checkpoint.restore(path, BareWeights("LightningDiT-tiny"))


SCHEDULER = dict(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)


@pytest.fixture(scope="module")
def pipeline(tiny_vae):
    """diffusers' DiTPipeline with random weights, the embedders the same in all blocks, as DiT has them."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=8, num_layers=3, patch_size=2, sample_size=8,
                                        in_channels=4, out_channels=8, num_embeds_ada_norm=10).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for block in transformer.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    return DiTPipeline(transformer, AutoencoderKL.from_pretrained(tiny_vae), DDIMScheduler(**SCHEDULER))


@pytest.fixture
def folder(pipeline, tmp_path):
    path = tmp_path / "published"
    pipeline.save_pretrained(path)
    edit(path / "model_index.json", id2label={i: f"thing {i}, whatsit {i}" for i in range(10)})  # as published
    return path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_diffusers_folder_is_the_dit_in_it(folder, pipeline):
    """Equal outputs, where diffusers' frequencies and one epsilon are set to DiT's."""
    ours, transformer, (x, t, y) = checkpoint.restore(folder), copy.deepcopy(pipeline.transformer), batch()
    before = transformer(x, 1000 * t, y).sample
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    expected = transformer(x, 1000 * t, y).sample
    assert_equal(ours.model(x, 1000 * t, y), expected)
    assert (before - expected).norm() > 0.01 * expected.norm()  # what the 127 costs: it is not our mapping that hides it
    spec = ours.spec
    assert (ours.name, spec.image_size, spec.vae) == ("published", (64, 64), str(folder / "vae"))
    assert spec.classes[3] == "thing 3, whatsit 3"
    assert (spec.sampling.sampler, spec.sampling.cfg_channels) == ("ddpm", 3)
    assert spec.diffusion == dict(noise_schedule="linear", diffusion_steps=1000, objective="epsilon", learn_sigma=True)


def test_a_bin_file_as_published_is_read(folder):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    expected = checkpoint.restore(folder).model.state_dict()
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel")  # as the published ones say
    found = checkpoint.restore(folder).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(("options", "count"), [
    (dict(variant="fp16"), 1), (dict(max_shard_size="40KB"), 4), (dict(max_shard_size="40KB", variant="fp16"), 4),
    (dict(variant="fp16", safe_serialization=False), 1)])
def test_parts_and_half_precision_are_read(pipeline, tmp_path, options, count):
    """Network and autoencoder; full precision is taken where it is there too."""
    half = copy.deepcopy(pipeline).to(torch.float16)
    half.save_pretrained(tmp_path / "half", **options)
    names = [path.name for path in (tmp_path / "half" / "transformer").glob("*.[sb][ai][fn]*") if path.suffix != ".json"]
    assert len(names) >= count
    restored = checkpoint.restore(tmp_path / "half")
    half.to(torch.float32).save_pretrained(tmp_path / "whole")
    expected = checkpoint.restore(tmp_path / "whole")
    assert all(torch.equal(value, expected.model.state_dict()[key]) for key, value in restored.model.state_dict().items())
    assert ("variant fp16 only" in restored.remark) == ("variant" in options)
    assert restored.name == "half"
    vae, other = (load_autoencoder(each.spec.vae).vae.state_dict() for each in (restored, expected))
    assert all(torch.equal(vae[key], value) and vae[key].dtype == torch.float32 for key, value in other.items())

    before = restored.sha256()
    part = tmp_path / "half" / "transformer" / names[-1]
    load, save = (load_file, save_file) if part.suffix == ".safetensors" else (torch.load, torch.save)
    save({key: value + 1 for key, value in load(part).items()}, part)
    assert restored.sha256() != before
    part.unlink()
    with pytest.raises(FileNotFoundError, match=part.name if count > 1 else "transformer holds no"):
        checkpoint.restore(tmp_path / "half")
    shutil.copytree(tmp_path / "whole", tmp_path / "half", dirs_exist_ok=True)
    assert checkpoint.restore(tmp_path / "half").remark == ""


def test_half_precision_is_fetched_from_the_hub_only_where_nothing_else_is(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(files, "download_folder", lambda name, patterns: asked.append(patterns) or folder)
    assert checkpoint.resolve("someone/dit") == folder
    assert asked == [checkpoint.HUB_FILES]
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert checkpoint.resolve("someone/dit") == folder
    assert any(fnmatch("vae/diffusion_pytorch_model.fp16.safetensors", pattern) for pattern in asked[-1])
    for name in ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json"):
        assert any(fnmatch(f"transformer/{name}", pattern) for pattern in asked[0])


def test_other_folders_are_refused(folder):
    index, network, scheduler = "model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"
    source = checkpoint.open_source(folder)
    for name, changes, words in (
            (index, dict(_class_name="PixArtAlphaPipeline"), "holds PixArtAlphaPipeline"),
            (network, dict(_class_name="SD3Transformer2DModel"), "_class_name is SD3Transformer2DModel"),
            (network, dict(num_layers=4), "lacks transformer_blocks.3.norm1.linear.weight"),
            (network, dict(num_layers=2), "has transformer_blocks.2."),
            (scheduler, dict(beta_end=0.012), "betas 0.0001 to 0.012"),
            (scheduler, dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr")):
        with pytest.raises(UserError, match=words):
            interpret(replace(source, configs=source.configs | {name: source.configs[name] | changes}), BareWeights())
    bias = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias"
    other = replace(source, weights=source.weights | {bias: source.weights[bias] + 1})
    with pytest.raises(UserError, match="blocks 0 and 2 differ in norm1"):
        interpret(other, BareWeights())
    with pytest.raises(UserError, match="`objective` sit contradicts the file, whose format is diffusers"):
        interpret(source, BareWeights(objective="sit"))


def test_folders_that_lack_something_are_refused(folder):
    edit(folder / "transformer" / "config.json", patch_size=0)
    with pytest.raises(UserError, match="published: "):  # an error of Python, with the path before it
        checkpoint.restore(folder)
    for name, words in (("transformer/diffusion_pytorch_model.safetensors", "transformer holds no diffusion_pytorch_model"),
                        ("scheduler/scheduler_config.json", r"scheduler_config\.json does not exist")):
        (folder / name).unlink()
        with pytest.raises(OSError, match=words):
            checkpoint.restore(folder)


def test_schedulers_and_predictions():
    assert interchange.diffusion_of(SCHEDULER | dict(prediction_type="v_prediction"), False)["objective"] == "v"
    cosine = dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=400)
    assert interchange.diffusion_of(cosine, True) == dict(
        noise_schedule="squaredcos_cap_v2", diffusion_steps=400, objective="epsilon", learn_sigma=True)


def test_sits_weights_sample_with_every_switch(tmp_path, tiny_vae, run_here):
    """SiT's preset, size and classes are told by the shapes."""
    torch.save(random_weights(learn_sigma=True), tmp_path / "sit.pt")
    done = run_here(sample, "--ckpt", tmp_path / "sit.pt", "--objective", "sit", "--vae", tiny_vae, "--num-sampling-steps", "6",
                    "--device", "cpu", "--out", tmp_path / "x.png", "--class-labels", "3", "--sampler", "dpm++", "--reuse",
                    "forecast", "--guidance-interval", "100", "900", "--cfg-scale", "2")
    assert "weights of sit's flow" in done.stdout
    assert "1 images of 3 in" in done.stdout
