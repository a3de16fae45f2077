"""What the tests share: the real scripts as sub-processes, small pictures, a small autoencoder, a small trained run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two gloo processes on two cores; tiny tensors gain nothing from threads

import numpy as np
import pytest
import torch
from PIL import Image

from models import DiT_models
from pipeline import checkpoint
from runtime import cli

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent

TINY_RUN = ["--data-path", "digits", "--vae", "pixels", "--model", "DiNext-S/2", "--model-args",
            '{"hidden_size": 32, "depth": 2}', "--global-batch-size", "12", "--num-workers", "0", "--log-every", "1",
            "--preview-every", "0", "--lr", "0.002", "--ema-decay", "0.5", "--device", "cpu"]


def run_script(script, *flags, cwd, nproc=None, check=True, **env):
    """Start a script as its users do, as plain python or under torchrun; returns the finished process."""
    launcher = [] if nproc is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}",
                                           f"--log-dir={cwd}/torchelastic"]
    result = subprocess.run([sys.executable, *launcher, str(ROOT / script), *map(str, flags)], cwd=cwd, text=True,
                            capture_output=True, timeout=240, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | env)
    if check and result.returncode:
        raise AssertionError(f"{script} exited {result.returncode}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return result


PATCH_NAMES = """
import os, signal, sys, time
import torch
import train
from pipeline import checkpoint
from runtime import cli, files
from training import datasets, objective, order, runs, state
RANK, LAUNCH = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)
"""  # what the lines of Python given to `patched` and `run_patched` may use, beside `before` and `patch`


def calls_before(patch):
    """`before(owner, name, action)`: from now on `action` is called with the arguments of owner.name before it is."""
    def before(owner, name, action):
        original = getattr(owner, name)

        def function(*args, **kwargs):
            action(*args)
            return original(*args, **kwargs)

        patch.setattr(owner, name, function)
    return before


def patched(cwd, code):
    """train.py with lines of Python run before its main, to break it at a chosen point: the path of a script."""
    path = cwd / "patched_train.py"
    path.write_text(f"""import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
from conftest import calls_before
{PATCH_NAMES}
class patch:
    setattr = setattr
before = calls_before(patch)
{code}
if __name__ == "__main__":
    sys.argv[0] = "train.py"
    cli.run(train.main, train.build_parser())
""")
    return path


@pytest.fixture
def run_patched(run_here, monkeypatch, tmp_path):
    """train.py in this process, in tmp_path, with lines of Python run before: as `patched`, but sooner started."""
    import train

    def run(code, *flags):
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            exec(PATCH_NAMES + code, {"before": calls_before(patch), "patch": patch})
            return run_here(train, *flags)
    return run


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Run a script's main in this process, as its `__main__` does: (main module, flags) -> finished process."""
    def run(script, *flags):
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, flags)])
        grad, code = torch.is_grad_enabled(), 0
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capfd.readouterr()
        try:
            cli.run(script.main, script.build_parser())
        except SystemExit as exit:
            code = exit.code
        finally:
            torch.set_grad_enabled(grad)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(script.__name__, code, out, err)
    return run


def save_random_checkpoint(path, channels, classes):
    """A DiT of random weights, learned variance and 8x8 pixels, that recommends 4 steps of ddpm and guidance of 2."""
    torch.manual_seed(0)
    kwargs = dict(input_size=(8, 8), in_channels=channels, num_classes=len(classes), hidden_size=24, depth=2, num_heads=2)
    model = DiT_models["DiT-S/2"](**kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    checkpoint.save(path, {"ema": model.state_dict(), "spec": {
        "model": {"name": "DiT-S/2", "args": kwargs}, "diffusion": {}, "vae": "pixels", "image_size": (8, 8),
        "channels": channels, "classes": classes,
        "sampling": {"sampler": "ddpm", "num_sampling_steps": "4", "cfg_scale": 2.0, "cfg_channels": None}}})
    return path


def analytic_model(x, t, learned=True):
    """The model of tests/golden/README.md."""
    u = t.view(-1, 1, 1, 1) / 1000
    out = 0.8 * x + 0.1 * torch.sin(3 * x) + 0.05 * u
    return torch.cat([out, torch.tanh(0.5 * x - u)], dim=1) if learned else out


def assert_close(a, b, tolerance=1e-5):
    b = torch.as_tensor(b)
    error = (a - b).abs() / (1 + b.abs())
    assert error.max() <= tolerance, f"off by {error.max():.2e}"


def assert_one_line(result, *words):
    """A wrong input: exit code 2 and exactly one line on stderr, with these words in it."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a run of a few steps on digits, flow objective."""
    cwd = tmp_path_factory.mktemp("tiny")
    run_script("train.py", *TINY_RUN, "--diffusion-args", '{"objective": "flow"}', "--max-steps", 6, "--run-name", "tiny",
               cwd=cwd)
    return cwd / "results" / "tiny"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of classes of small JPEGs: train and val, two classes of three files; one greyscale, one CMYK."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c, name in enumerate(("n02099601", "tabby cat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i, mode in enumerate(("RGB", "L", "CMYK")):
                y, x = np.mgrid[:40, : 36 + 7 * i] / 40
                pixels = np.stack([x, y, np.full_like(x, c)], -1) * 200 + rng.uniform(0, 30, (*x.shape, 3))
                Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / f"{i}.jpg", quality=95)
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
