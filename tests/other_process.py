"""sample_ddp.py, slowed down, killed or measured: python tests/other_process.py FUNCTION [flags], also under torchrun."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime import cli, log

RANK = os.environ.get("RANK", "0")


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

    generate, batches = sample_ddp.generate, []

    def generate_after(*args):
        batches.append(1)
        before_batch(len(batches))
        return generate(*args)

    sample_ddp.generate, sys.argv = generate_after, ["sample_ddp.py", *flags]
    cli.run(sample_ddp.main, sample_ddp.build_parser())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
