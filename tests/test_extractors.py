import sys

import numpy as np
import pytest
import torch
from conftest import draw_images
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Library

from evaluation import extractors
from evaluation.extractors import INCEPTION, INCEPTION_SHA256, Inception, inception_weights
from evaluation.image_sets import STATISTICS
from runtime.files import sha256


@pytest.fixture
def inception(inception_file):
    return Inception(inception_file, torch.device("cpu"))


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


def test_the_network_is_in_evaluation_mode_where_its_library_leaves_it_in_training(inception_file, monkeypatch):
    """torch-fidelity 0.3 did: then features would depend on the batch."""
    begin = Library.__init__
    monkeypatch.setattr(Library, "__init__", lambda self, *args, **kwargs: (begin(self, *args, **kwargs), self.train())[0])
    assert not any(module.training for module in Inception(inception_file, torch.device("cpu")).network.modules())


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


def test_the_network_sees_tensorflow_1s_resize(inception):
    """Bilinear, from pixel y * H / 299 without half a pixel's shift, no antialiasing: by a double loop."""
    size = (310, 20)
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


def test_weights_are_found_in_the_cache_or_downloaded_to_it_once_and_no_others_are_taken(tmp_path, monkeypatch, capsys):
    server = tmp_path / "server.pth"
    server.write_bytes(b"weights")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(extractors, "INCEPTION_URL", f"file://{server}")
    with pytest.raises(OSError, match=r"cannot download .*incomplete"):
        inception_weights(None)
    with pytest.raises(ValueError, match=f"`weights` .*server.pth is not {INCEPTION}.* {sha256(server)}.*{INCEPTION_SHA256}"):
        inception_weights(str(server))
    with pytest.raises(OSError, match=r"`weights` v.pth is not a file"):
        inception_weights("v.pth")
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256(server))
    path = inception_weights(None)
    assert path == tmp_path / "checkpoints" / INCEPTION
    server.unlink()
    assert inception_weights(None) == path
    assert capsys.readouterr().out.count("Downloading") == 2


def test_without_torch_fidelity_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[eval\]'"):
        Inception(None, torch.device("cpu"))
