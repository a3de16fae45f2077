import json
import re

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, assert_close, family, golden_network, random_network
from timm import layers as timm_layers
from timm.layers.grn import GlobalResponseNorm as TimmGlobalResponseNorm
from timm.models.vision_transformer import Attention as TimmAttention
from torch.utils.flop_counter import FlopCounterMode

import models
from models import DiNextV3, DiT, GlobalResponseNorm, TimestepEmbedder
from pipeline.spec import constructor_of, defaults_of
from small_models import DIFFUSION_NETWORKS, Autoencoder_models

TINY = {
    "DiT": dict(hidden_size=24, depth=3, num_heads=2),
    "DiNext-U": dict(hidden_size=8, depths=(1, 2, 1, 1, 2)),
    "DiNext": dict(hidden_size=16, depth=3),
    "DiNextV2": dict(hidden_size=16, depth=3),
    "DiNextV3": dict(hidden_size=16, depth=2, num_heads=2, attention_every=1),
    "PixArt": dict(hidden_size=24, depth=3, num_heads=2),
    "LightningDiT": dict(hidden_size=24, depth=3, num_heads=2),
    "MLP": dict(hidden_size=16, label_features=5),
    "ConvAdaLN": dict(hidden_size=16, depth=3),
}
SEAMED = ["DiT-S/2", "DiNext-S/2", "DiNextV3-S/2", "DiNext-U-S", "PixArt-B/2", "LightningDiT-XL/1", "MLP", "ConvAdaLN"]


def tiny(name, **kwargs):
    """The preset, small, with every parameter random. A new family is built as its preset is, until TINY has it."""
    if "learn_sigma" not in defaults_of(constructor_of(name)[0]):
        kwargs.pop("learn_sigma", None)
    settings = {"input_size": 8, "num_classes": 5, **TINY.get(family(name), {}), **kwargs}
    return random_network(DIFFUSION_NETWORKS[name], 0.2, **settings)


def inputs(model, batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.in_channels, *model.input_size, generator=generator)
    return x, torch.tensor([0.0, 417.25, 999.0])[:batch], torch.tensor([0, 1, model.num_classes])[:batch]


# --- the published DiT ---------------------------------------------------------------------------


def test_dit_has_the_published_keys_and_shapes():
    for name, golden in json.loads((GOLDEN / "dit_state_dicts.json").read_text()).items():
        with torch.device("meta"):
            model = DIFFUSION_NETWORKS[name]()
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == golden["state_dict"]
        assert sum(p.numel() for p in model.parameters()) == golden["parameters"]


@pytest.mark.parametrize("file", ["dit_tiny_latent.npz", "dit_tiny_gray.npz"])
def test_dit_outputs_are_the_original_ones(file):
    golden, (kwargs, state) = np.load(GOLDEN / file), golden_network(file)
    model = DiT(**kwargs).eval()
    assert_close(model.pos_embed, state["pos_embed"])
    model.load_state_dict(state, strict=True)
    x, t, y, cfg_y = (torch.from_numpy(golden[key]) for key in ("x", "t", "y", "cfg_y"))
    with torch.no_grad():
        assert_close(model(x, t, y), golden["forward"])
        assert_close(model(x, t + 0.25, y), golden["forward_fractional_t"])
        for scale in (1.0, 1.7, 4.0):
            out = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), cfg_y, scale)
            assert_close(out, golden[f"forward_with_cfg_{scale}"])


def test_dit_initialisation_has_the_original_statistics():
    golden = json.loads((GOLDEN / "dit_init_stats.json").read_text())
    torch.manual_seed(0)
    model = DiT(input_size=16, patch_size=2, hidden_size=192, depth=2, num_heads=3, num_classes=10)
    assert set(golden) == set(model.state_dict())
    for key, value in model.state_dict().items():
        mean, std, largest = golden[key]
        if std == 0:
            assert value.abs().max() == largest == 0, key
            continue
        error = std / value.numel() ** 0.5
        assert abs(value.mean().item() - mean) < 6 * error, key
        assert abs(value.std().item() - std) < 6 * error, key
        assert abs(value.abs().max().item() / largest - 1) < 0.25, key


# --- the table of models -------------------------------------------------------------------------

# the papers' figures: million parameters, GMAC at 32x32x4, the tolerance of each
TABLE = {
    "DiT-S/2": (33, 6.1, 0.01, 0.01), "DiT-B/2": (130, 23, 0.01, 0.01), "DiT-L/2": (458, 81, 0.01, 0.01),
    "DiT-XL/2": (675, 119, 0.01, 0.01),
    "DiNext-S/2": (17.2, 2.8, 0.03, 0.03), "DiNext-B/2": (67, 11.0, 0.03, 0.03), "DiNext-L/2": (233, 39, 0.03, 0.03),
    "DiNext-XL/2": (342, 57.6, 0.03, 0.03), "DiNextV2-S/2": (17.1, 2.8, 0.003, 0.03),
    "DiNextV3-S/2": (33 * 0.78, 6.1, 0.04, 0.05), "DiNextV3-B/2": (130 * 0.78, 23, 0.04, 0.05),
    "DiNextV3-L/2": (458 * 0.78, 81, 0.04, 0.05), "DiNextV3-XL/2": (675 * 0.78, 119, 0.04, 0.05),
    "DiNext-U-S": (32.7, 3.0, 0.01, 0.06), "DiNext-U-B": (127.7, 11.8, 0.01, 0.06),
    "DiNext-U-L": (394.4, 35.7, 0.01, 0.06), "DiNext-U-XL": (698.8, 63, 0.01, 0.06),
}
README_TABLE = {f"{kind}{size}{patch}": cell.strip() for kind, patch, cells in re.findall(
    r"^\| `(\S+)\*(\S*)` \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    for size, cell in zip(("S", "B", "L", "XL"), cells.split("|"), strict=True)}


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_multiply_accumulates(name):
    """Near the papers' figures, and exactly what the README says (which has no row for DiNextV2)."""
    with torch.device("meta"):
        model = DIFFUSION_NETWORKS[name]()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long))
    found = sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9
    for figure, expected, tolerance in zip(found, TABLE[name][:2], TABLE[name][2:]):
        assert figure == pytest.approx(expected, rel=tolerance)
    assert set(README_TABLE) == set(TABLE) - {"DiNextV2-S/2"}
    assert README_TABLE.get(name, f"{found[0]:.1f} M, {found[1]:.1f} G") == f"{found[0]:.1f} M, {found[1]:.1f} G"


# --- layers --------------------------------------------------------------------------------------


class TimmRMSNorm(models.RMSNorm):
    """Our RMSNorm with the arguments that timm gives."""

    def __init__(self, dim, device=None, dtype=None):
        super().__init__(dim)


class TimmRotaryAttention(TimmAttention):
    """timm's rotary positions and a softmax written out, in timm's attention."""

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        sin, cos = timm_layers.build_rotary_pos_embed([3, 5], dim=self.head_dim, in_pixels=False)
        q, k = (timm_layers.apply_rot_embed(part, sin, cos) for part in (self.q_norm(q), self.k_norm(k)))
        weights = (q @ k.transpose(-2, -1) / self.head_dim**0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def attention(timms, qk_norm, *rotary):
    return (lambda: models.Attention(24, 2, qk_norm),
            lambda: timms(24, num_heads=2, qkv_bias=True, qk_norm=qk_norm, norm_layer=TimmRMSNorm), (2, 15, 24), rotary)


ROTARY = models.rotary_tables((3, 5), 12, torch.device("cpu"))
LAYERS = {  # name: (ours, timm's, the shape of x, what our forward takes after x)
    "patches": (lambda: models.PatchEmbed((6, 10), 2, 3, 24),
                lambda: timm_layers.PatchEmbed((6, 10), 2, 3, 24, output_fmt="NHWC"), (2, 3, 6, 10), ()),
    "attention": attention(TimmAttention, False), "attention, qk_norm": attention(TimmAttention, True),
    "rotary": attention(TimmRotaryAttention, False, *ROTARY), "rotary, qk_norm": attention(TimmRotaryAttention, True, *ROTARY),
    "mlp": (lambda: models.Mlp(24, 96), lambda: timm_layers.Mlp(24, 96, act_layer=lambda: torch.nn.GELU("tanh")),
            (2, 15, 24), ()),
    "gated mlp": (lambda: models.GatedMlp(24, 64),
                  lambda: timm_layers.GluMlp(24, 128, act_layer=torch.nn.SiLU, gate_last=False), (2, 15, 24), ()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_timms(name):
    """The same keys, initial draws, outputs and gradients, and the same dtypes under autocast."""
    build, build_timms, shape, rest = LAYERS[name]
    torch.manual_seed(0)
    layer = build()
    torch.manual_seed(0)
    oracle = build_timms()
    assert list(layer.state_dict()) == list(oracle.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), oracle.parameters()))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    oracle.load_state_dict(layer.state_dict())
    x = torch.randn(shape, requires_grad=True)
    out, expected = layer(x, *rest), oracle(x)
    assert_close(out, expected.detach(), 1e-6)
    weight = torch.randn(out.shape)
    found, exact = (torch.autograd.grad((y * weight).sum(), [x, *network.parameters()])
                    for y, network in ((out, layer), (expected, oracle)))
    for a, b in zip(found, exact):
        assert (a - b).norm() <= 1e-6 * b.norm() + 1e-12 * a.numel()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, timms = layer(x, *rest), oracle(x)
    assert rounded.dtype == timms.dtype == torch.bfloat16
    assert (rounded - timms).norm() < 0.01 * timms.norm()


# --- every backbone ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIFFUSION_NETWORKS)
def test_every_entry_takes_any_channels_sizes_and_classes(name):
    for in_channels in (1, 16) if name in SEAMED else (3,):
        model = tiny(name, input_size=(8, 16), in_channels=in_channels, num_classes=1, learn_sigma=in_channels != 16)
        x, t, y = inputs(model)
        out = model(x, t, y.clamp(max=1))
        learned = in_channels != 16 and "learn_sigma" in defaults_of(constructor_of(name)[0])
        assert out.shape == (3, in_channels * (2 if learned else 1), 8, 16)
        assert 0 < out.std() < float("inf")


@pytest.mark.parametrize("name", SEAMED)
def test_samples_of_a_batch_do_not_mix_and_every_input_counts(name):
    model = tiny(name)
    x, t, y = inputs(model)
    with torch.no_grad():
        out = model(x, t, y)
        for changed in ((x + torch.randn_like(x), t, y), (x, t + 50, y), (x, t, (y + 1) % 6)):
            assert (model(*changed) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-3
        x2, t2, y2 = x.clone(), t.clone(), y.clone()
        x2[0], t2[0], y2[0] = 0, 3, 4
        assert torch.equal(model(x2, t2, y2)[1:], out[1:])


@pytest.mark.parametrize("name", SEAMED)
def test_any_split_of_the_seam_gives_the_forward_pass(name):
    model = tiny(name)
    x, t, y = inputs(model)
    with torch.no_grad():
        out, c = model(x, t, y), model.condition(t, y)
        for split in (None, *range(len(model.blocks) + 1)):
            state = model.encode(x, c, split)
            assert isinstance(state, tuple)
            assert torch.equal(model.decode(state, c, split), out)
        with pytest.raises(ValueError, match=r"split 99 is not in 0\.\."):
            model.encode(x, c, 99)


def test_rotary_tables_are_built_once_for_each_half_of_a_forward_pass(monkeypatch):
    calls, rotary_tables = [], models.rotary_tables
    monkeypatch.setattr(models, "rotary_tables", lambda *args: calls.append(args) or rotary_tables(*args))
    model = tiny("LightningDiT-XL/1")
    model(*inputs(model))
    assert (len(model.blocks), len(calls)) == (3, 2)


def test_the_default_splits_are_those_of_faster_diffusion():
    with torch.device("meta"):
        assert DIFFUSION_NETWORKS["DiT-XL/2"]().default_split == 18
        assert DIFFUSION_NETWORKS["DiNext-U-XL"]().default_split == 3 + 6 + 12
        assert DIFFUSION_NETWORKS["MLP"]().default_split == 1  # 0 would compute everything and reuse the noisy pixels


@pytest.mark.parametrize("name", ["LightningDiT-XL/1", "DiNext-U-S", "DiNextV3-S/2"])
def test_gradient_checkpointing_changes_memory_and_not_gradients(name):
    def gradients(**kwargs):
        model = tiny(name, **kwargs).train()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            loss = model(*inputs(model)).square().mean()
        loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}, sum(saved)

    plain, plain_memory = gradients()
    checkpointed, memory = gradients(gradient_checkpointing=True)
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)
    assert memory < 0.7 * plain_memory


@pytest.mark.parametrize("name", ["DiNext-S/2", "DiNextV2-S/2"])
def test_a_dinext_block_is_the_written_formula(name):
    """dw 7x7 -> LayerNorm -> modulate -> Linear C->3C -> GELU -> GRN, if any -> Linear -> gate, written out on one sample."""
    model = tiny(name)
    block, x, c = model.blocks[0], torch.randn(1, 4, 4, 16), torch.randn(1, 16)
    h = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), block.dwconv.weight, block.dwconv.bias, padding=3, groups=16)
    h = h.permute(0, 2, 3, 1)
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    scale, shift, gate = (torch.nn.functional.silu(c) @ block.adaLN_modulation[1].weight.T
                          + block.adaLN_modulation[1].bias)[0].split(16)
    h = h * (1 + scale) + shift
    h = torch.nn.functional.gelu(h @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    assert h.shape[-1] == 48
    if name == "DiNext-S/2":
        norm = h.square().sum(dim=(1, 2), keepdim=True).sqrt()
        h = h + block.mlp.grn.weight * (h * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + block.mlp.grn.bias
    expected = x + gate * (h @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    assert_close(block(x, c), expected)


def test_dinextv3_is_the_written_formula():
    """Stem, residual block, attention block, residual block and head, written out on one sample."""
    model = tiny("DiNextV3-S/2", learn_sigma=False)
    x, t, y = inputs(model, 1)
    first, attention, second = model.blocks
    conv = torch.nn.functional.conv2d

    def group_norm(h, norm):
        groups = h.reshape(8, -1)
        groups = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return groups.view(h.shape) * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    def residual(h, block):
        scale, shift = (c @ block.adaLN_modulation[1].weight.T + block.adaLN_modulation[1].bias)[0].view(2, 16, 1, 1)
        inner = conv(group_norm(h, block.norm1), block.conv1.weight, block.conv1.bias, padding=1) * (1 + scale) + shift
        inner = group_norm(torch.nn.functional.gelu(inner), block.norm2)
        return h + conv(inner, block.conv2.weight, block.conv2.bias, padding=1)

    c = torch.nn.functional.silu(model.t_embedder(t) + model.y_embedder(y))
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))  # a token sees the 4x4 pixels around its 2x2
    patches = torch.nn.functional.unfold(padded, 4, stride=2)
    h = (model.x_embedder.proj.weight.flatten(1) @ patches[0] + model.x_embedder.proj.bias[:, None]).view(1, 16, 4, 4)
    h = residual(h, first)
    tokens = group_norm(h, attention.norm).flatten(2).transpose(1, 2)  # (1, 16, D)
    gate = (c @ attention.adaLN_modulation[1].weight.T + attention.adaLN_modulation[1].bias)[0]
    q, k, v = attention.attn.qkv(tokens).view(16, 3, 2, 8).permute(1, 2, 0, 3)
    weighted = (q @ k.transpose(-2, -1) / 8**0.5).softmax(dim=-1) @ v
    h = h + (gate * attention.attn.proj(weighted.transpose(0, 1).reshape(1, 16, 16))).transpose(1, 2).view(1, 16, 4, 4)
    h = group_norm(torch.nn.functional.gelu(residual(h, second)), model.head[1])
    pixels = conv(h, model.head[2].weight, model.head[2].bias, padding=1).view(4, 2, 2, 4, 4)
    assert_close(model(x, t, y), pixels.permute(0, 3, 1, 4, 2).reshape(1, 4, 8, 8))


def test_dinextv3_outputs_are_the_golden_ones():
    """Its formula is tested above; this holds the names of its weights, `time_scale` and the order of its blocks, too."""
    golden, (kwargs, state) = np.load(GOLDEN / "dinextv3_tiny.npz"), golden_network("dinextv3_tiny.npz")
    model = DiNextV3(**kwargs).eval()
    model.load_state_dict(state, strict=True)
    x, t, y, r = (torch.from_numpy(golden[key]) for key in ("x", "t", "y", "r"))
    with torch.no_grad():
        assert_close(model(x, t, y), golden["forward"])
        assert_close(model(x, t, y, r), golden["forward_map"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_global_response_norm_is_timms(dtype, tolerance):
    """timm's in float64 is the oracle. Its own error in bf16 is 1.7e-3, with twice the passes over x."""
    layer, oracle = GlobalResponseNorm(12), TimmGlobalResponseNorm(12).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    oracle.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4, 5, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, ..., 2] = 0  # a channel without a response, whose norm has no derivative
    exact = x.double().requires_grad_()
    x.requires_grad_()
    out, expected = layer(x), oracle(exact)
    assert out.dtype == dtype
    assert (out - expected).norm() / expected.norm() < tolerance
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (x.grad - exact.grad).norm() / exact.grad.norm() < 2 * tolerance


@pytest.mark.parametrize("name", SEAMED)
def test_the_residual_stream_has_the_dtype_of_the_input(name):
    """Whatever autocast makes of convolutions and products, and so in both halves of a reused network."""
    model, seen = tiny(name), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].dtype))
    x, t, y = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t, y)
        state = model.encode(x, model.condition(t, y), len(model.blocks) - 1)
    assert seen == [torch.float32] * (2 * len(model.blocks) - 1)
    assert {features.dtype for features in state} == {torch.float32}


@pytest.mark.parametrize(("name", "depth"), [("LightningDiT-XL/1", dict(depth=1)), ("DiNext-U-S", dict(depths=(1,) * 5)),
                                             ("DiNextV3-S/2", {})])
def test_a_backbone_can_be_exported_with_a_dynamic_batch(name, depth):
    model = tiny(name, **depth)
    x, t, y = inputs(model)
    exported = torch.export.export(model, (x[:2], t[:2], y[:2]), dynamic_shapes=3 * [{0: torch.export.Dim.DYNAMIC}])
    assert torch.allclose(exported.module()(x, t, y), model(x, t, y), atol=1e-5)


def test_parameters_of_small_systems():
    for name, kwargs, parameters in (
            ("MLP", {}, 7_421_508),         # MinDiff
            ("ConvAdaLN", {}, 10_606_984),  # MinDiff says 10.6 M
            ("PixArt-B/2", dict(input_size=8, in_channels=16, num_classes=10, learn_sigma=False), 89_525_824),  # nano: 88.7 M
            ("DiT-S/8", dict(in_channels=1, num_classes=10, learn_sigma=False), 32_521_792)):  # xdiffusion's lesson: 32.5 M
        with torch.device("meta"):
            assert sum(p.numel() for p in DIFFUSION_NETWORKS[name](**kwargs).parameters()) == parameters, name


@pytest.mark.parametrize(("name", "adaln"), [("DiT-S/2", "zero"), ("DiNext-S/2", "zero"), ("DiNext-S/2", "single"),
                                             ("PixArt-B/2", "single"), ("DiNextV3-S/2", None)])
def test_an_untrained_network_answers_zero_its_blocks_are_identities_and_every_parameter_learns(name, adaln):
    model = DIFFUSION_NETWORKS[name](input_size=8, num_classes=5, **TINY[family(name)],
                                     **({"adaln": adaln} if adaln else {}))
    x, t, y = inputs(model)
    assert model(x, t, y).abs().max() == 0
    h = torch.randn(3, 16, 4, 4) if "V3" in name else torch.randn(3, 4, 4, 16) if "DiNext" in name else torch.randn(3, 16, 24)
    assert all(torch.equal(block(h, model.condition(t, y)), h) for block in model.blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {key: p.clone() for key, p in model.named_parameters()}
    for _ in range(4):
        optimizer.zero_grad()
        (model(x, t, y) - 1).square().mean().backward()
        optimizer.step()
    same = [key for key, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[key])]
    assert same == []


def test_adaln_single_shares_one_projection_and_adds_a_table():
    model = tiny("DiT-S/2", adaln="single")
    _, t, y = inputs(model)
    c = model.condition(t, y)
    shared = model.shared_modulation[1]
    assert_close(c, torch.nn.functional.silu(model.t_embedder(t) + model.y_embedder(y)) @ shared.weight.T + shared.bias)
    for block in model.blocks:
        assert torch.equal(block.adaLN_modulation(c), c + block.adaLN_modulation.table)


def test_the_class_token_is_one_more_key_and_value_of_attention():
    model = tiny("PixArt-B/2")
    attention, x, c = model.blocks[0].attn, torch.randn(2, 16, 24), torch.randn(2, 7 * 24)
    q, k, v = (attention.qkv(torch.cat([x, c[:, None, -24:]], dim=1)).view(2, 17, 3, 2, 12).permute(2, 0, 3, 1, 4))
    weights = (q[:, :, :16] @ k.transpose(-2, -1) / 12**0.5).softmax(dim=-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 16, 24))
    assert_close(model.blocks[0].attend(x, c), expected)
    with pytest.raises(ValueError, match="needs adaln 'single'"):
        DiT(class_token=True)


def test_the_mlp_is_the_written_formula():
    model = tiny("MLP", input_size=4, in_channels=1)
    x, t, y = torch.randn(1, 1, 4, 4), torch.tensor([250.0]), torch.tensor([3])
    label, linear = model.norm(model.embedding_table.weight[3]), model.blocks[0].linear
    hidden = torch.cat([x.flatten(), torch.tensor([0.25]), label]) @ linear.weight.T + linear.bias
    hidden = hidden * torch.tanh(torch.log(1 + hidden.exp()))
    hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt()
    hidden = hidden * model.blocks[0].norm.weight + model.blocks[0].norm.bias
    expected = (hidden @ model.head.weight.T + model.head.bias).view(1, 1, 4, 4)
    assert_close(model(x, t, y), expected)
    null = model.condition(t, torch.tensor([5]))  # its embedding is zero
    assert torch.equal(null, torch.cat([torch.tensor([[0.25]]), model.norm.bias[None]], dim=1))


def test_a_conv_adaln_block_is_the_written_formula():
    model = tiny("ConvAdaLN")
    block, x, c = model.blocks[0], torch.randn(1, 16, 4, 4), torch.randn(1, 16)

    def group_norm(x, norm):
        groups = x.reshape(8, -1)
        groups = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return groups.view(x.shape) * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    conv = torch.nn.functional.conv2d
    scale, shift = (c @ block.modulation.weight.T + block.modulation.bias)[0].view(2, 16, 1, 1)
    h = scale * conv(group_norm(x, block.norm), block.conv.weight, block.conv.bias, padding=1) + shift
    h = group_norm(h * torch.tanh(torch.log(1 + h.exp())), block.norm0)
    assert_close(block(x, c), x + conv(h, block.conv0.weight, block.conv0.bias, padding=1))
    h, (_, norm, last) = torch.randn(1, 16, 4, 4), model.head
    expected = conv(group_norm(h * torch.tanh(torch.log(1 + h.exp())), norm), last.weight, last.bias, padding=1)
    assert_close(model.decode((h.permute(0, 2, 3, 1),), c, split=len(model.blocks)), expected)
    t, y = torch.tensor([250.0]), torch.tensor([3])
    linear, label = model.embedder[0], model.embedding_table(y)
    embedded = torch.cat([TimestepEmbedder.timestep_embedding(t, 8), label], dim=1) @ linear.weight.T + linear.bias
    assert_close(model.condition(t, y), embedded * torch.tanh(torch.log(1 + embedded.exp())))


def test_the_autoencoder_has_standardised_latents():
    """test_compatibility.py holds its layers: initial weights and a golden reconstruction."""
    model = Autoencoder_models["Autoencoder-F4C8"](input_size=(64, 48))
    assert sum(p.numel() for p in model.parameters()) == 575_627
    images = torch.rand(2, 3, 64, 48) * 2 - 1
    latents = model.encode(images)
    assert latents.shape == (2, 8, 16, 12)
    assert latents.flatten(1).mean(dim=1).abs().max() < 1e-5
    assert latents.detach().flatten(1).var(dim=1, unbiased=False) == pytest.approx(1, abs=1e-2)
    assert model(images).shape == images.shape
    finer = Autoencoder_models["Autoencoder-F2C4"](input_size=(64, 48), hidden_size=8)
    assert finer.encode(images).shape == (2, 4, 32, 24)
    assert finer(images).shape == images.shape
    coarser = Autoencoder_models["Autoencoder-F4C8"](input_size=(64, 48), hidden_size=8, factor=8, latent_channels=5)
    assert coarser.encode(images).shape == (2, 5, 8, 6)
    assert coarser(images).shape == images.shape
    for wrong, words in ((dict(input_size=30), "multiples of 4"), (dict(factor=6), "must be 2, 4, 8"),
                         (dict(factor=1), "must be 2, 4, 8"), (dict(latent_channels=0), "at least 1")):
        with pytest.raises(ValueError, match=words):
            Autoencoder_models["Autoencoder-F4C8"](**wrong)


@pytest.mark.slow
def test_inductor_compiles_a_training_step_of_groups_of_more_than_8_channels():
    """Its CPU code fails where the gradient of GroupNorm meets another order of dimensions."""
    model = tiny("DiNextV3-S/2", hidden_size=96)
    x, t, y = inputs(model)
    weight = torch.randn(x.shape[0], model.out_channels, *model.input_size)

    def gradient(network):
        parts = torch.autograd.grad((network(x, t, y) * weight).sum(), [*model.parameters()])
        return torch.cat([part.flatten() for part in parts])

    expected = gradient(model)
    assert (gradient(torch.compile(model)) - expected).norm() < 1e-4 * expected.norm()


def test_wrong_arguments_are_named():
    for name in ("DiT-S/2", "DiNext-U-S"):
        for wrong, words in ((dict(input_size=9), r"input_size \(.*multiples of [24]"), (dict(input_size=(8, 0)), "multiples"),
                             (dict(input_size=(8, 8, 8)), "multiples"), (dict(num_classes=0), "at least 1")):
            with pytest.raises(ValueError, match=words), torch.device("meta"):
                DIFFUSION_NETWORKS[name](**wrong)
    for name in ("DiT-S/2", "DiNext-U-S", "DiNextV3-S/2", "ConvAdaLN"):
        for scale in (0, -1):  # 0 would hide the time
            with pytest.raises(ValueError, match=r"time_scale .*positive"):
                tiny(name, time_scale=scale)
    for name in ("DiNext-S/2", "DiNextV3-S/2"):
        with pytest.raises(ValueError, match=r"\(8, 10\).*input_size is \(8, 8\)"):
            tiny(name)(torch.zeros(1, 4, 8, 10), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    for wrong, words in ((dict(depth=0), "depth 0"), (dict(attention_every=0), "attention_every 0"), (dict(num_heads=0), "(0)"),
                         (dict(num_heads=5), "hidden_size 16 must be a positive multiple of num_heads (5) and of 16"),
                         (dict(hidden_size=24), "of 16"),
                         (dict(map_split=3), "map_split 3 leaves no block")):
        with pytest.raises(ValueError, match=re.escape(words)):
            tiny("DiNextV3-S/2", **wrong)
