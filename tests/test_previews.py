
from conftest import CLASSES, random_network
from PIL import Image, ImageSequence

from models import DiT_models
from pipeline.autoencoders import Pixels
from pipeline.settings import SamplingSettings
from pipeline.spec import ModelSpec, Spec
from runtime.processes import start_world
from training import previews
from training.previews import preview


def spec_of(classes, **sampling):
    args = dict(input_size=(8, 8), in_channels=3, num_classes=len(classes), hidden_size=24, depth=1, num_heads=2)
    return Spec(ModelSpec("DiT-S/2", "DiT", args), {}, "pixels", (8, 8), 3, classes, SamplingSettings(**sampling))


def drawn(spec, path):
    """The preview of a random network: the names it returns, its text chunks, how often the network was called."""
    network, calls = random_network(DiT_models["DiT-S/2"], 0.1, **spec.model.args), []
    network.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    names = preview(network, Pixels(), spec, path, start_world("cpu"), 0, "fp32", lambda: None, None)
    with Image.open(path) as picture:
        return names, picture.text, calls, picture.size


def test_a_preview_names_its_classes_and_replaces_only_ddpm(tmp_path):
    for recommended, used in ((("ddpm", 250), ("dpm++", "20", 20)), (("ddim", "ddim50"), ("ddim", "ddim50", 50))):
        spec = spec_of(CLASSES, sampler=recommended[0], num_sampling_steps=recommended[1])
        names, text, calls, _ = drawn(spec, tmp_path / "x.png")
        assert names == CLASSES
        assert text["classes"] == str(CLASSES)
        assert (text["sampler"], text["steps"], len(calls)) == used


def test_of_many_classes_ten_are_shown_evenly(tmp_path):
    spec = spec_of([f"class {i}" for i in range(91)], num_sampling_steps=3)
    names, _, calls, size = drawn(spec, tmp_path / "removed" / "x.png")
    assert names == [f"class {i}" for i in range(0, 91, 10)]
    assert set(calls) == {40}
    assert size == (10 * 72 + 8, 4 * 72 + 8)


def test_a_film_of_many_previews_is_every_kth_up_to_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(previews, "MAX_FRAMES", 4)
    (tmp_path / "previews").mkdir()
    for i in range(9):
        Image.new("RGB", (4, 4), (20 * i, 0, 0)).save(tmp_path / f"previews/{i:07d}.png")
    previews.save_previews_gif(tmp_path)
    with Image.open(tmp_path / "previews.gif") as film:
        reds = [frame.convert("RGB").getpixel((0, 0))[0] for frame in ImageSequence.Iterator(film)]
    assert reds == [40, 100, 160]
