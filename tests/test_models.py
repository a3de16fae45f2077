import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import DiT, DiT_models

GOLDEN = Path(__file__).parent / "golden"
TINY = {
    "DiT": dict(hidden_size=24, depth=3, num_heads=2),
    "DiNext-U": dict(hidden_size=8, depths=(1, 2, 1, 1, 2)),
    "DiNext": dict(hidden_size=16, depth=3),
}


def family(name):
    return name.split("/")[0].rsplit("-", 1)[0]


def tiny(name, **kwargs):
    """The preset, small, with every parameter random: an untrained network answers 0 and would hide faults."""
    torch.manual_seed(0)
    model = DiT_models[name](**{"input_size": 8, "num_classes": 5, **TINY[family(name)], **kwargs})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(model, batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.in_channels, *model.input_size, generator=generator)
    return x, torch.tensor([0.0, 417.25, 999.0])[:batch], torch.tensor([0, 1, model.num_classes])[:batch]


def close(a, b):
    b = torch.as_tensor(b)
    return bool(((a - b).abs() <= 1e-5 * (1 + b.abs())).all())


# --- the published DiT ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", json.loads((GOLDEN / "dit_state_dicts.json").read_text()))
def test_dit_has_the_published_keys_and_shapes(name):
    golden = json.loads((GOLDEN / "dit_state_dicts.json").read_text())[name]
    with torch.device("meta"):
        model = DiT_models[name]()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == golden["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == golden["parameters"]


@pytest.mark.parametrize("file", ["dit_tiny_latent.npz", "dit_tiny_gray.npz"])
def test_dit_outputs_are_the_original_ones(file):
    golden = np.load(GOLDEN / file)
    model = DiT(**json.loads(str(golden["kwargs"]))).eval()
    state = {key.removeprefix("param/"): torch.from_numpy(golden[key]) for key in golden.files if key.startswith("param/")}
    assert close(model.pos_embed, state["pos_embed"])
    model.load_state_dict(state, strict=True)
    x, t, y, cfg_y = (torch.from_numpy(golden[key]) for key in ("x", "t", "y", "cfg_y"))
    with torch.no_grad():
        assert close(model(x, t, y), golden["forward"])
        assert close(model(x, t + 0.25, y), golden["forward_fractional_t"])
        for scale in (1.0, 1.7, 4.0):
            out = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), cfg_y, scale)
            assert close(out, golden[f"forward_with_cfg_{scale}"])


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
        error = std / value.numel() ** 0.5  # of the mean; the standard deviation's is smaller still
        assert abs(value.mean().item() - mean) < 6 * error, key
        assert abs(value.std().item() - std) < 6 * error, key
        assert abs(value.abs().max().item() / largest - 1) < 0.25, key


# --- the table of models -------------------------------------------------------------------------

# name: (million parameters, GMAC at 32x32x4, tolerance of each)
TABLE = {
    "DiT-S/2": (33, 6.1, 0.01, 0.01), "DiT-B/2": (130, 23, 0.01, 0.01), "DiT-L/2": (458, 81, 0.01, 0.01),
    "DiT-XL/2": (675, 119, 0.01, 0.01),
    "DiNext-S/2": (17.2, 2.8, 0.03, 0.03), "DiNext-B/2": (67, 11.0, 0.03, 0.03), "DiNext-L/2": (233, 39, 0.03, 0.03),
    "DiNext-XL/2": (342, 57.6, 0.03, 0.03),
    "DiNext-U-S": (32.7, 3.0, 0.01, 0.06), "DiNext-U-B": (127.7, 11.8, 0.01, 0.06),
    "DiNext-U-L": (394.4, 35.7, 0.01, 0.06), "DiNext-U-XL": (698.8, 63, 0.01, 0.06),
}


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_multiply_accumulates(name):
    with torch.device("meta"):
        model = DiT_models[name]()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long))
    parameters, gmac, parameter_tolerance, gmac_tolerance = TABLE[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=parameter_tolerance)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=gmac_tolerance)


def test_the_registry_holds_every_family_and_size():
    sizes = ("S", "B", "L", "XL")
    isotropic = {f"{kind}-{size}/{patch}" for kind in ("DiT", "DiNext") for size in sizes for patch in (2, 4, 8)}
    assert set(DiT_models) == isotropic | {f"DiNext-U-{size}" for size in sizes}


# --- every backbone ------------------------------------------------------------------------------


@pytest.mark.parametrize("in_channels", [1, 3, 4, 16])
@pytest.mark.parametrize("name", DiT_models)
def test_every_entry_takes_any_channels_sizes_and_classes(name, in_channels):
    model = tiny(name, input_size=(8, 16), in_channels=in_channels, num_classes=1, learn_sigma=in_channels == 4)
    x, t, y = inputs(model)
    y = y.clamp(max=1)  # the null class of one class is 1, not 1000
    out = model(x, t, y)
    assert out.shape == (3, in_channels * (2 if in_channels == 4 else 1), 8, 16)
    assert out.isfinite().all()
    assert out.std() > 0


@pytest.mark.parametrize("name", ["DiT-S/2", "DiNext-S/2", "DiNext-U-S"])
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


@pytest.mark.parametrize("name", ["DiT-S/2", "DiNext-S/2", "DiNext-U-S"])
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


def test_the_default_splits_are_those_of_faster_diffusion():
    with torch.device("meta"):
        assert DiT_models["DiT-XL/2"]().default_split == 18
        assert DiT_models["DiNext-U-XL"]().default_split == 3 + 6 + 12


@pytest.mark.parametrize("name", ["DiT-S/2", "DiNext-S/2", "DiNext-U-S"])
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


@pytest.mark.parametrize("name", ["DiT-S/2", "DiNext-S/2", "DiNext-U-S"])
def test_an_untrained_network_answers_zero_and_its_blocks_are_identities(name):
    model = DiT_models[name](input_size=8, num_classes=5, **TINY[family(name)])
    x, t, y = inputs(model)
    assert model(x, t, y).abs().max() == 0
    block, c = model.blocks[0], model.condition(t, y)
    h = torch.randn(3, 16, 24) if name.startswith("DiT") else torch.randn(3, 8, 8, block.dwconv.in_channels)
    assert torch.equal(block(h, c[0] if isinstance(c, tuple) else c), h)


def test_a_dinext_block_is_the_written_formula():
    """dw 7x7 -> LayerNorm -> modulate -> Linear C->3C -> GELU -> GRN -> Linear -> gate, written out on one sample."""
    model = tiny("DiNext-S/2")
    block, x, c = model.blocks[0], torch.randn(1, 4, 4, 16), torch.randn(1, 16)
    h = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), block.dwconv.weight, block.dwconv.bias, padding=3, groups=16)
    h = h.permute(0, 2, 3, 1)
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    scale, shift, gate = (torch.nn.functional.silu(c) @ block.adaLN_modulation[1].weight.T
                          + block.adaLN_modulation[1].bias)[0].split(16)
    h = h * (1 + scale) + shift
    h = torch.nn.functional.gelu(h @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    assert h.shape[-1] == 48
    norm = h.square().sum(dim=(1, 2), keepdim=True).sqrt()
    h = h + block.mlp.grn.weight * (h * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + block.mlp.grn.bias
    expected = x + gate * (h @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    assert close(block(x, c), expected)


@pytest.mark.parametrize("name", ["DiT-S/2", "DiNext-S/2", "DiNext-U-S"])
def test_wrong_arguments_are_named(name):
    with pytest.raises(TypeError, match="hidden_sise"):
        DiT_models[name](hidden_sise=8)
    with pytest.raises(ValueError, match="multiples of"):
        DiT_models[name](input_size=9)
    with pytest.raises(ValueError, match="at least 1"):
        DiT_models[name](num_classes=0)
