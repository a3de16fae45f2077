"""What tests run in another process: python tests/other_process.py FUNCTION [flags], also under torchrun."""

import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime import cli, files, log, processes

RANK = os.environ.get("RANK", "0")


def hold_lock(folder):
    """Lock a folder, print "held" and wait."""
    files.lock_folder(Path(folder), False, "")
    print("held", flush=True)
    time.sleep(60)


def open_run(results, *names):
    """Open a run's folder, as train.py does."""
    from training import runs

    runs.open_run(Path(results), *names)


def print_digests(settings):
    """For presets built after manual_seed(0) with these settings, the sha256 of keys, shapes, types and bytes, as JSON."""
    from small_models import NETWORKS

    digests = {}
    for name, arguments in json.loads(settings).items():
        torch.manual_seed(0)
        digest = hashlib.sha256()
        for key, value in NETWORKS[name](input_size=8, **arguments).state_dict().items():
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.contiguous().numpy().tobytes())
        digests[name] = digest.hexdigest()
    print(json.dumps(digests))


def measure_memory():
    """Print the page faults of tensors of 108 MiB that come and go 12 times, and how many denormal numbers are not 0."""
    torch.set_num_threads(2)
    processes.start_world("cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for r in range(12):
        tensors = [torch.ones(2**18 * (1 + (3 * i + r) % 8)) for i in range(24)]
        del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(torch.full((2**22,), 2e-39).mul(0.5).count_nonzero().item())


def evaluate_small(*flags):
    """Run evaluate.py with small features, in small batches."""
    from conftest import SMALL, SmallInception

    import evaluate
    from evaluation import extractors, figures, image_sets, metrics, survey

    extractors.Inception, extractors.inception_weights = SmallInception, lambda path: path
    figures.STATISTICS = image_sets.STATISTICS = SMALL
    survey.BATCH, metrics.SPLIT = 16, 20
    sys.argv = ["evaluate.py", *flags]
    cli.run(evaluate.main, evaluate.build_parser())


# --- sample_ddp.py -------------------------------------------------------------------------------


def sample_and_lose_rank_1(*flags):
    """Rank 1 is killed at its second batch."""
    sample_ddp_with(lambda batch: time.sleep(0.3) or (RANK == "1" and batch == 2 and os.kill(os.getpid(), signal.SIGKILL)),
                    flags)


def sample_slowly(*flags):
    sample_ddp_with(lambda batch: time.sleep(0.5), flags)


def sample_and_measure_memory(*flags):
    sample_ddp_with(lambda batch: None, flags)
    print("GiB", log.peak_memory(torch.device("cpu")))


def sample_ddp_with(before_batch, flags):
    """Run sample_ddp.py, with a call before each batch of this process: 1, 2, …"""
    import sample_ddp
    from pipeline import drawing

    generate, batches = drawing.generate, []

    def generate_after(*args):
        batches.append(1)
        before_batch(len(batches))
        return generate(*args)

    drawing.generate, sys.argv = generate_after, ["sample_ddp.py", *flags]
    cli.run(sample_ddp.main, sample_ddp.build_parser())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
