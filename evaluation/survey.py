"""Extract the features of every image of a set, shared among processes."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.extractors import STAND_INS, flat_pixels
from evaluation.image_sets import BATCH, ImageSet
from evaluation.metrics import Gaussian, InceptionScore, Nearest, RunningCovariance
from runtime.files import in_batches
from runtime.processes import World
from runtime.randomness import generator


class Survey:
    """The results of the extractors on a set: filled batch by batch, and merged over processes."""

    def __init__(self):
        self.covariances: dict[str, RunningCovariance] = {}  # by the features' name
        self.kept = defaultdict(list)  # by name, [(position, features of a batch)]
        self.inception_score = InceptionScore()
        self.correct = self.labelled = 0

    def update(self, positions: np.ndarray, labels: np.ndarray | None, features: dict[str, Tensor], kept: list[str]) -> None:
        for name, values in features.items():
            if name == "logits":
                self.inception_score.update(positions, values.cpu())
            elif name == "predictions":
                if labels is not None:
                    self.correct += int((values.cpu().numpy() == labels).sum())
                    self.labelled += len(labels)
            else:
                self.covariances.setdefault(name, RunningCovariance(values.shape[1], values.device)).update(values)
                if name in kept:
                    self.kept[name].append((positions[0], values.cpu()))

    def cpu(self) -> "Survey":
        """Move the survey to the CPU, ready to be sent, and return it."""
        self.covariances = {name: covariance.cpu() for name, covariance in self.covariances.items()}
        return self

    def merge(self, other: "Survey") -> None:
        for name, covariance in other.covariances.items():
            self.covariances.setdefault(name, RunningCovariance(len(covariance.mean))).merge(covariance)
            self.kept[name] += other.kept[name]
        self.inception_score.merge(other.inception_score)
        self.correct, self.labelled = self.correct + other.correct, self.labelled + other.labelled

    def gaussians(self, names: Iterable[str]) -> dict[str, Gaussian]:
        """The Gaussians of the features with these names. A name without features is left out."""
        return {name: self.covariances[name].gaussian() for name in names if name in self.covariances}

    def features(self, name: str) -> Tensor:
        """The kept features (N, D), in the order of the images."""
        return torch.cat([features for _, features in sorted(self.kept[name], key=lambda batch: batch[0])])


def survey(image_set: ImageSet, extractors: dict[str, Callable], world: World, kept: list[str] = (),
           indices: np.ndarray | None = None, title: str = "", progress: Callable[[], object] = lambda: None) -> Survey:
    """Run the extractors on the images of a set, or on those at `indices`. The main process returns the whole Survey.

    Args:
        progress: called after each batch that all processes have, by all together. It may raise an exception, to stop.
    """
    share, whole = Survey(), Survey()
    if image_set.images is None:
        return whole
    indices = np.arange(len(image_set.images)) if indices is None else indices
    labels = image_set.images.labels if "classifier" in extractors else None
    rounds = -(-len(indices) // BATCH) // world.size
    for k, (positions, images) in enumerate(read_batches(image_set.images, indices, world, title or image_set.title)):
        features = {}
        for extract in extractors.values():
            features |= extract(images)
        share.update(positions, None if labels is None else labels[indices[positions]], features, kept)
        if k < rounds:
            progress()
    for part in world.gather(share.cpu()):
        whole.merge(part)
    return whole


def read_batches(images, indices: np.ndarray, world: World, title: str) -> Iterator[tuple[np.ndarray, Tensor]]:
    """This process's batches of images: (positions in `indices`, (B, H, W, 3) uint8 on the device).

    The next batch is read while one is in use.
    """
    batches = in_batches(len(indices), BATCH)[world.rank :: world.size]
    with ThreadPoolExecutor(1) as reader, tqdm(total=len(indices), desc=title, unit="image", disable=not world.is_main) as bar:
        arrays = images.read(indices[batch] for batch in batches)
        coming = reader.submit(next, arrays, None)
        for batch in batches:
            arrived, coming = coming.result(), reader.submit(next, arrays, None)
            yield batch, torch.from_numpy(arrived).to(world.device)
            bar.update(min(len(batch) * world.size, bar.total - bar.n))


def survey_floor(ref: ImageSet, samples: ImageSet, training: ImageSet | None, seen: Survey, extractors: dict[str, Callable],
                 world: World, progress: Callable[[], object] = lambda: None) -> tuple[Survey, Survey, str] | None:
    """Real images against real ones: as many training images as samples against REF, or two parts of REF without them.

    Returns: both surveys and the number of images in each, or None if there is nothing to compare.
    """
    extractors = {name: extract for name, extract in extractors.items() if name in STAND_INS}
    if not extractors or ref.images is None or samples.images is None:
        return None
    real, most = (training, len(training.images)) if training else (ref, len(ref.images) // 2)
    order = torch.randperm(len(real.images), generator=generator("floor")).numpy()
    count = min(len(samples.images), most)
    first, rest = (seen if part is None else survey(real, extractors, world, indices=np.sort(part), title="real images",
                                                    progress=progress)
                   for part in (order[:count], None if training else order[count:]))
    return first, rest, f"N = {count:,} against {len(ref.images) if training else len(order) - count:,}"


def survey_nearest(training: ImageSet, surveys: list[Survey], world: World) -> list[Tensor]:
    """For each survey of pixels, the distances (N,) of its images to the nearest training image (main process only)."""
    features = world.on_main(lambda: [images.features("pixels") for images in surveys])
    nearest = Nearest(torch.cat(features))
    for _, images in read_batches(training.images, np.arange(len(training.images)), world, training.title):
        nearest.update(flat_pixels(images)["pixels"].cpu())
    for part in world.gather(nearest.squares)[1:]:
        nearest.squares = nearest.squares.minimum(part)
    return list(nearest.distances().split([len(part) for part in features]))
