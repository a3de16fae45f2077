"""What the tests share: the real scripts as sub-processes, small pictures, a small autoencoder, a small trained run."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # two gloo processes on two cores; tiny tensors gain nothing from threads

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import extractors, image_sets
from evaluation import figures as figure_list
from models import DiT, DiT_models
from pipeline import checkpoint
from runtime import cli
from runtime.processes import SIGNALS

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts are imported by name
OF_PYTHON = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONFAULTHANDLER": "1"}  # a process that aborts tells where it was

TINY_RUN = ["--data-path", "digits", "--vae", "pixels", "--model", "DiNext-S/2", "--model-args",
            '{"hidden_size": 32, "depth": 2}', "--global-batch-size", "12", "--num-workers", "0", "--log-every", "1",
            "--preview-every", "0", "--lr", "0.002", "--ema-decay", "0.5", "--device", "cpu"]


def run_script(script, *flags, cwd, nproc=None, check=True, **env):
    """Start a script as its users do, as plain python or under torchrun; returns the finished process."""
    launcher = [] if nproc is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}",
                                           f"--log-dir={cwd}/torchelastic"]
    result = subprocess.run([sys.executable, *launcher, str(ROOT / script), *map(str, flags)], cwd=cwd, text=True,
                            capture_output=True, timeout=240, env=os.environ | OF_PYTHON | env)
    if check and result.returncode:
        raise AssertionError(f"{script} exited {result.returncode}:\n{result.stderr}\n{result.stdout}")
    return result


def run_processes(count, name, *words, cwd):
    """Start a function of other_process.py in several processes that find each other, without torchrun's agent."""
    env = os.environ | OF_PYTHON | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                                    "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    command = [sys.executable, str(ROOT / "tests" / "other_process.py"), name, *map(str, words)]
    started = [subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
    for process in started:
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed


@pytest.fixture
def run_sabotaged(run_here, monkeypatch, tmp_path):
    """train.py in this process, in tmp_path, broken by a function of saboteurs.py: (function, flags) -> finished process."""
    import train

    def run(saboteur, *flags):
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            saboteur(patch)
            return run_here(train, *flags)
    return run


def train_here(cwd, *flags):
    """Train in this process; an error keeps its traceback."""
    import train

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with contextlib.chdir(cwd):
        train.main(train.build_parser().parse_args(list(map(str, flags))))
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_here(call_here):
    """Run a script's main in this process, as its `__main__` does: (main module, flags) -> finished process."""
    return lambda script, *flags: call_here(
        lambda: cli.run(script.main, script.build_parser()), f"{script.__name__}.py", *flags)


@pytest.fixture
def call_here(monkeypatch, capfd):
    """Call a function in this process as if it were a script: (function, words of the command) -> finished process."""
    def call(function, *words):
        monkeypatch.setattr("sys.argv", list(map(str, words)))
        grad, code = torch.is_grad_enabled(), 0
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        capfd.readouterr()
        try:
            function()
        except SystemExit as exit:
            code = exit.code
        finally:
            torch.set_grad_enabled(grad)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(words, code, out, err)
    return call


def free_port():
    """A port of 127.0.0.1 that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(a, b, tolerance=1e-5):
    b = torch.as_tensor(b)
    error = (a - b).abs() / (1 + b.abs())
    assert error.max() <= tolerance, f"off by {error.max():.2e}"


def assert_same_images(a, b):
    """uint8: at most one grey level apart, in at most 0.1 % of the pixels."""
    difference = (torch.as_tensor(a).int() - torch.as_tensor(b).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 0.001


def assert_one_line(result, *words):
    """A wrong input: exit code 2 and exactly one line on stderr, with these words in it."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def family(name):
    """DiNext-U of DiNext-U-S."""
    return name.split("/")[0].rsplit("-", 1)[0]


def random_network(constructor, std, seed=0, dtype=torch.float32, **kwargs):
    """A network with every parameter random: an untrained one answers 0 and would hide faults."""
    torch.manual_seed(seed)
    model = constructor(**kwargs).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def randomised(network):
    """The network with random numbers in all that is trained."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def analytic_model(x, t, learned=True):
    """The model of tests/golden/README.md."""
    u = t.view(-1, 1, 1, 1) / 1000
    out = 0.8 * x + 0.1 * torch.sin(3 * x) + 0.05 * u
    return torch.cat([out, torch.tanh(0.5 * x - u)], dim=1) if learned else out


def save_random_checkpoint(path, channels, classes, size=8, **args):
    """A DiT of random weights, learned variance and pixels, that recommends 4 steps of ddpm and guidance of 2."""
    kwargs = dict(input_size=(size, size), in_channels=channels, num_classes=len(classes), hidden_size=24, depth=2,
                  num_heads=2) | args
    model = random_network(DiT_models["DiT-S/2"], 0.15, **kwargs)
    checkpoint.save(path, {"ema": model.state_dict(), "spec": {
        "model": {"name": "DiT-S/2", "class": "DiT", "args": kwargs}, "diffusion": {}, "vae": "pixels",
        "image_size": (size, size), "channels": channels, "classes": classes,
        "sampling": {"sampler": "ddpm", "num_sampling_steps": "4", "cfg_scale": 2.0, "cfg_channels": None}}})
    return path


CLASSES = ["tench, Tinca tinca", "golden retriever", "zero", "tiger cat", "cat"]


@pytest.fixture(scope="session")
def gaussian_run(tmp_path_factory):
    """A checkpoint of random weights with learned variance, three channels and a random answer."""
    return save_random_checkpoint(tmp_path_factory.mktemp("gaussian") / "g.pt", 3, CLASSES)


def golden_network(file="dit_tiny_latent.npz"):
    """A tiny network of tests/golden: its arguments and state dict."""
    golden = np.load(GOLDEN / file)
    weights = {key.removeprefix("param/"): torch.from_numpy(golden[key]) for key in golden.files if key.startswith("param/")}
    return json.loads(str(golden["kwargs"])), weights


@pytest.fixture
def tiny_preset(monkeypatch):
    """The golden network under a name of the registry."""
    kwargs, weights = golden_network()
    monkeypatch.setitem(DiT_models, "DiT-tiny", lambda **rest: DiT(**{**kwargs, **rest}))
    return weights


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a run of a few steps on digits, flow objective."""
    cwd = tmp_path_factory.mktemp("tiny")
    train_here(cwd, *TINY_RUN, "--diffusion-args", '{"objective": "flow"}', "--max-steps", 6, "--run-name", "tiny")
    return cwd / "results" / "tiny"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of classes of small JPEGs: train and val, two classes of three files; one greyscale, one CMYK."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for c, name in enumerate(("train/n02099601", "train/tabby cat", "val/n02099601", "val/tabby cat")):
        (root / name).mkdir(parents=True)
        for i, mode in enumerate(("RGB", "L", "CMYK")):
            y, x = np.mgrid[:40, : 36 + 7 * i] / 40
            pixels = np.stack([x, y, np.full_like(x, c % 2)], -1) * 200 + rng.uniform(0, 30, (*x.shape, 3))
            Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(root / name / f"{i}.jpg", quality=95)
    return root


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """A random AutoencoderKL of factor 8, saved to a folder as Stable Diffusion's is."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4,
                        scaling_factor=0.18215)
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


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
    import evaluate

    def run(*flags):
        result = run_here(evaluate, *flags, "--device", "cpu", "--json", tmp_path / "figures.json")
        assert result.returncode == 0, result.stderr
        report = json.loads((tmp_path / "figures.json").read_text())
        return {figure["name"]: figure for figure in report["figures"]}, report | {"said": result.stdout}
    return run


def value(found, name):
    """The value of one of the figures that `figures` found."""
    return found[0][name]["value"]


def all_features(images):
    """The features of SmallInception, by name."""
    features = SmallInception(None, None)(torch.from_numpy(images))
    return {name: values.double().numpy() for name, values in features.items()}


def numpys_distance(a, b):
    """Fréchet distance with numpy's covariances and the eigenvalues of their product."""
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(s_a @ s_b).astype(complex)).real.sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a) + np.trace(s_b) - 2 * root


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights of torch-fidelity's Inception in a file. Activations neither vanish nor explode."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    with mock.patch.object(torch, "load"), mock.patch.object(Network, "load_state_dict"):  # the constructor calls these
        network = Network("random", ["2048"], feature_extractor_weights_path="none")
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def theirs(inception_file):
    """torch-fidelity's own extractor: bias included in "logits"."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased", "logits"],
                                       feature_extractor_weights_path=str(inception_file))
