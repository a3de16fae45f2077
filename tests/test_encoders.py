from functools import partial

import numpy as np
import pytest
import timm
import torch
from conftest import random_network
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch.nn.functional import interpolate
from torchvision.transforms.functional import normalize

from evaluation.extractors import ClassifierFeatures
from pipeline import checkpoint
from pipeline.encoders import SHORT_NAMES, ViT, load_encoder
from small_models import Classifier

CPU = torch.device("cpu")


def draw(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def cache(folder, name, weights):
    """Put weights of a timm model into a hub's cache."""
    repository, commit = folder / f"models--timm--{name}", "0123456" + "a" * 33
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    save_file(weights, path := repository / "snapshots" / commit / "model.safetensors")
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@torch.no_grad()
def test_a_vit_is_loaded_by_name_and_describes_pictures_of_any_size(hub):
    network = random_network(partial(timm.create_model, "test_vit"), 0.15)
    cache(hub, "test_vit.r160_in1k", network.state_dict())
    torch.manual_seed(7)
    encoder = load_encoder("test_vit", CPU)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(7).get_state())  # training's numbers stay
    assert encoder.width == 64
    for size, grid in (((32, 40), (16, 16)), ((256, 512), (16, 32)), ((511, 256), (16, 16))):
        images = draw(2, 3, *size)
        resized = interpolate(images / 127.5 - 1, (16 * grid[0], 16 * grid[1]), mode="bicubic")  # its mean and std: 0.5
        expected = network.forward_features(resized)[:, 1:].view(2, *grid, 64)
        assert encoder.token_shape(size, 3) == (*grid, 64)
        torch.testing.assert_close(encoder(images), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "size"), [("vit_base_patch14_dinov2", 256), ("vit_base_patch14_reg4_dinov2", 512)])
def test_dinov2_sees_what_repa_shows_it(name, size):
    """Normalised, then bicubic to 224 * (size // 256); positions are resampled to as many patches."""
    assert SHORT_NAMES["dinov2"] == "vit_base_patch14_dinov2"
    tiny = partial(timm.create_model, name, embed_dim=16, depth=2, num_heads=2)
    network = random_network(partial(tiny, dynamic_img_size=True), 0.15)
    images, seen, count = draw(1, 3, size, size), 224 * (size // 256), size // 16
    theirs, weights = tiny(img_size=seen), network.state_dict()
    prefix = 0 if theirs.no_embed_class else 1
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [count, count], num_prefix_tokens=prefix)
    theirs.load_state_dict(weights)
    x = interpolate(normalize(images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), seen, mode="bicubic")
    tokens = theirs.eval().forward_features(x)
    assert tokens.shape[1] == count**2 + theirs.num_prefix_tokens
    torch.testing.assert_close(ViT(name, network)(images).flatten(1, 2), tokens[:, -count * count :], atol=1e-4, rtol=1e-4)


@pytest.fixture(params=["vit", "classifier"])
def encoder(request, tmp_path):
    if request.param == "vit":
        return ViT("tiny", random_network(partial(timm.create_model, "test_vit", dynamic_img_size=True), 0.15))
    return load_encoder(f"classifier:{save_classifier(tmp_path / 'c.pt', [32, 20])}", CPU)


def save_classifier(path, size):
    torch.manual_seed(0)
    network = Classifier(num_classes=5, width=8)
    network.apply(lambda module: setattr(module, "momentum", 1.0))
    network(torch.randn(8, 3, *size))  # in training mode: BatchNorm's running means and variances
    checkpoint.save(path, {"classifier": network.state_dict(), "spec": {
        "network": {"num_classes": 5, "width": 8}, "size": size, "data": "digits", "test_images": 1, "test_accuracy": 0.2}})
    return path


def test_an_encoder_is_frozen_and_takes_grey_pictures(encoder):
    images = draw(2, 1, 50, 20)
    tokens = encoder.train()(images)
    assert tokens.shape == (2, *encoder.token_shape((50, 20), 1))
    assert torch.equal(tokens, encoder.eval()(images.expand(-1, 3, -1, -1)))
    assert not tokens.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    mirrored = encoder(images.flip(-1))
    assert not torch.allclose(mirrored, tokens, atol=1e-2)
    assert not torch.allclose(mirrored.flip(-2), tokens, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = encoder(images)
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - tokens).norm() < 0.1 * tokens.norm()
    with pytest.raises(ValueError, match="1 or 3 channels, not of 4"):
        encoder.token_shape((50, 20), 4)


def test_a_classifiers_tokens_are_the_features_that_evaluation_averages(tmp_path):
    path = save_classifier(tmp_path / "c.pt", [32, 20])
    encoder, images = load_encoder(f"classifier:{path}", CPU), draw(3, 3, 50, 20)
    tokens = encoder(images)
    assert tokens.shape == (3, 8, 5, 32) == (3, *encoder.token_shape((50, 20), 3))
    assert tokens.std(dim=(1, 2)).mean() > 0.1
    expected = ClassifierFeatures(str(path), (50, 20), CPU)(images.permute(0, 2, 3, 1))["classifier"]
    assert torch.equal(tokens.mean(dim=(1, 2)), expected)
    with pytest.raises(ValueError, match=r"encoder classifier:\S+c.pt was trained on images of 32x20, not 28x20"):
        encoder.token_shape((28, 20), 3)


def test_wrong_names_are_refused_before_any_weights_are_asked_for(hub, tiny_run, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", None)
    for name, words in (
            ("dinov3", "not a model of timm with weights; allowed: dinov2, .*did you mean dinov2"),
            ("vit_base_patch14_dinov2.lvd", "did you mean vit_base_patch14_dinov2.lvd142m"),
            ("resnet50", "not a ViT with a token a patch; allowed: dinov2, .*dynamic_img_size"),
            ("swin_tiny_patch4_window7_224", "not a ViT with a token a patch"),
            ("vit_tiny_r_s16_p8_224", "not a ViT with a token a patch"),
            ("classifier:nowhere.pt", "encoder classifier:nowhere.pt: nowhere.pt does not exist"),
            (f"classifier:{checkpoint.latest(tiny_run)}", "was not written by benchmarks/classifier.py")):
        with pytest.raises((ValueError, OSError), match=words):
            load_encoder(name, CPU)


def test_weights_that_cannot_be_had_or_do_not_fit_are_one_line(hub):
    with pytest.raises(ValueError, match=r"dinov2: cannot load .*\(hf download timm/vit_base_patch14_dinov2.lvd142m\)"):
        load_encoder("dinov2", CPU)
    path = cache(hub, "test_vit.r160_in1k", timm.create_model("test_vit", embed_dim=32).state_dict())
    with pytest.raises(ValueError, match=r"encoder test_vit: cannot load its weights: .*size mismatch"):
        load_encoder("test_vit", CPU)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="encoder test_vit: cannot load its weights"):
        load_encoder("test_vit", CPU)
