"""Time and peak memory of evaluate.py, with random Inception weights: for use without the real ones.

    python benchmarks/evaluation_time.py REF SAMPLES --json evaluation.json    # evaluate.py's flags without --weights

Its five figures mean nothing, but the work is the same as with the real weights.
"""

import runpy
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation import extractors
from runtime.files import sha256

EVALUATE = str(Path(__file__).resolve().parent.parent / "evaluate.py")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        weights = random_weights(Path(folder))
        extractors.INCEPTION_SHA256 = sha256(weights)
        sys.argv = [EVALUATE, *sys.argv[1:], "--weights", str(weights)]
        runpy.run_path(EVALUATE, run_name="__main__")


def random_weights(folder: Path) -> Path:
    """Write a weights file for torch-fidelity's Inception. Activations neither vanish nor explode."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    with mock.patch.object(torch, "load"), mock.patch.object(Network, "load_state_dict"):  # the constructor calls these
        network = Network("random", ["2048"], feature_extractor_weights_path="none")
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    path = folder / "random.pth"
    torch.save(network.state_dict(), path)
    return path


if __name__ == "__main__":
    main()
