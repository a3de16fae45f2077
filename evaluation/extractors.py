"""images -> features: Inception, a small classifier, pixels."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.image_sets import ImageSet
from pipeline.encoders import check_size, load_classifier, pixel_features
from runtime import UserError
from runtime.cli import prefix_errors
from runtime.files import download, sha256

# FID's network: torch-fidelity's conversion of TensorFlow's weights of 2015.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
STAND_INS = {"pixels": "FD-pixel32", "classifier": "FD-classifier"}


class Inception:
    """ADM's features of images (B, H, W, 3) uint8: "pool" is `pool_3` (B, 2048); "spatial" is the first 7 channels of
    `mixed_6/conv`, (B, 17 * 17 * 7) with channels last; "logits" is 1,008 logits without bias.

    The network and TensorFlow 1's resize to 299x299 are torch-fidelity's.

    Args:
        weights: torch-fidelity's file. It is a pickle: make sure that it is the published one.

    Raises:
        UserError: torch-fidelity is not installed.
    """

    def __init__(self, weights: Path, device: torch.device):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise UserError("FID's Inception needs the package torch-fidelity: pip install '.[eval]'; `weights` none gives "
                            "figures without it") from None
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
        network.Mixed_6d.branch1x1.register_forward_hook(self._see)
        network.eval()  # torch-fidelity 0.3 leaves it in training mode
        self.network = network.to(device, memory_format=torch.channels_last)  # twice as fast on a CPU

    def _see(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.mixed_6 = output

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        pool, logits = self.network(images.permute(0, 3, 1, 2))
        spatial = self.mixed_6[:, :7].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": logits}


def inception_weights(path: str | None) -> Path:
    """The file of FID's Inception: the given file, torch's cached file, or a download. Raises UserError for a wrong file."""
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"`weights` {path} is not a file")
    file = Path(path) if path is not None else download(
        INCEPTION, INCEPTION_URL, "Apache 2.0", lambda file: sha256(file) == INCEPTION_SHA256)
    if (found := sha256(file)) != INCEPTION_SHA256:
        raise UserError(f"`weights` {file} is not {INCEPTION}: its sha256 is {found}, expected {INCEPTION_SHA256}"
                        f"{'; delete it to download it again' if path is None else ''}")
    return file


def flat_pixels(images: Tensor) -> dict[str, Tensor]:
    """Images (B, H, W, 3) uint8 -> each image's pixels as one vector, channel after channel."""
    return {"pixels": pixel_features(images.permute(0, 3, 1, 2)).flatten(1)}


class ClassifierFeatures:
    """Features and predictions of a classifier trained by benchmarks/classifier.py."""

    def __init__(self, path: str, size: tuple[int, int], device: torch.device):
        with prefix_errors("`classifier`"):
            self.network, spec = load_classifier(path)
            check_size(spec, path, size)
        self.network.to(device)
        self.about = {"path": path, "sha256": sha256(Path(path)),
                      **{key: spec[key] for key in ("data", "test_images", "test_accuracy")}}

    def check_labels(self, samples: ImageSet) -> None:
        """Raises UserError if a label is not one of the classifier's, or if the array of labels is invalid."""
        labels, count = samples.images and samples.images.labels, self.network.head.out_features
        if labels is not None and not (0 <= labels.min() and labels.max() < count):
            raise UserError(f"{samples.title} {samples.source}: arr_1 holds labels from {labels.min()} to {labels.max()}; the "
                            f"classifier has {count} classes, 0..{count - 1}")

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features = self.network.features(pixel_features(images.permute(0, 3, 1, 2)))
        return {"classifier": features, "predictions": self.network.head(features).argmax(dim=1)}


def open_extractors(ref: ImageSet, samples: ImageSet, device: torch.device, weights: str | None, classifier: str | None,
                    pixels: bool) -> dict[str, Callable]:
    """The requested extractors, by name, if there are images for them.

    Args:
        weights: of Inception; None uses torch's cache or downloads, "none" leaves Inception out.
        classifier: a file of benchmarks/classifier.py, or None.
        pixels: whether to use pixels even if Inception is used.
    """
    extractors = {}
    seen = samples.images or ref.images
    if classifier:
        if seen is None:
            raise UserError("`classifier` needs images; REF and SAMPLES hold statistics")
        extractors["classifier"] = ClassifierFeatures(classifier, seen.size, device)
        extractors["classifier"].check_labels(samples)
    if weights == "none" or pixels:
        extractors["pixels"] = flat_pixels
    if weights != "none" and seen:
        extractors["inception"] = Inception(inception_weights(weights), device)
    return extractors
