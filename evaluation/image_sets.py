"""Read and write the image sets and statistics that evaluate.py compares."""

import hashlib
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evaluation.metrics import Gaussian
from runtime import UserError
from runtime.files import find_files, in_batches, sha256
from runtime.npz import NpzImages, array_names, damage_as_oserror, save_npz
from runtime.pictures import EXTENSIONS, center_crop, open_rgb, picture, upright_size
from training.datasets import NAMED, ArrayImages, load_dataset, parts_among

BATCH = 64  # images per call of an extractor; the batches are the same for any number of processes
STATISTICS = {"pool": ("mu", "sigma", 2048), "spatial": ("mu_s", "sigma_s", 17 * 17 * 7)}  # names in a reference file, and D
REFERENCE_IMAGES = 10_000  # in a reference file, for precision and recall


@dataclass
class ImageSet:
    """One side of a comparison: images, or statistics of Inception's features, or both."""

    title: str  # what the user calls the set
    source: str
    images: object | None  # NpzImages, PictureFolder or NamedImages
    statistics: dict[str, Gaussian] = field(default_factory=dict)
    statistics_of: int | None = None  # number of images, if the file holds it

    @property
    def count(self) -> int | None:
        """The number of images behind FID; None if it is unknown."""
        return self.statistics_of if self.statistics else len(self.images)

    @property
    def cropped(self) -> bool:
        """Whether pictures of other sizes were cropped to this one."""
        return getattr(self.images, "cropped", False)

    def describe(self) -> dict:
        count, size = (len(self.images), list(self.images.size)) if self.images else (None, None)
        return {"source": self.source, "images": count, "size": size, "cropped": self.cropped,
                "statistics": bool(self.statistics), "statistics_of": self.statistics_of}

    def sha256(self) -> str:
        """Of the file; of the bytes of a named set (N, C, H, W); of a folder: of the lines of its pictures' sha256."""
        return self.images.sha256() if hasattr(self.images, "sha256") else sha256(Path(self.source))

    def say(self) -> str:
        """One line: how many images the figures are based on."""
        parts = []
        if self.images:
            height, width = self.images.size
            cropped = ", cropped to it" if self.cropped else ""
            parts.append(f"N = {len(self.images):,} of {height}x{width} (height x width{cropped})")
        if self.statistics:
            count = "an unknown number of" if self.statistics_of is None else f"{self.statistics_of:,}"
            parts.append(f"statistics of {count} images")
        parts += getattr(self.images, "remarks", [])
        return f"{self.title} {self.source}: {', '.join(parts)}"


def read_statistics(path: Path, title: str, names: set[str]) -> tuple[dict[str, Gaussian], int | None]:
    """ADM's statistics in an `.npz`, and the number of images behind them, if the file holds `n`."""
    statistics, count = {}, None
    with damage_as_oserror(f"{title} {path}"), np.load(path, allow_pickle=False) as file:
        for name, (mu, sigma, dimensions) in STATISTICS.items():
            if not {mu, sigma} & names:
                continue
            try:
                mean, covariance = (np.asarray(file[key], dtype=np.float64) for key in (mu, sigma))
                count = int(file["n"]) if "n" in names else None
            except (KeyError, ValueError, TypeError) as error:  # missing, or a pickle
                raise UserError(f"{title} {path}: {mu}, {sigma} and n cannot be read as numbers: {error}") from None
            if mean.shape != (dimensions,) or covariance.shape != (dimensions, dimensions):
                raise UserError(f"{title} {path}: {mu} is {mean.shape} and {sigma} {covariance.shape}; expected "
                                f"({dimensions},) and ({dimensions}, {dimensions})")
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise UserError(f"{title} {path}: {mu} or {sigma} has values that are not finite")
            if not np.allclose(covariance, covariance.T):
                raise UserError(f"{title} {path}: {sigma} is not symmetric, so not a covariance")
            statistics[name] = Gaussian(mean, covariance)
    return statistics, count


def save_statistics(path: Path, ref: ImageSet, gaussians: dict[str, Gaussian]) -> None:
    """Write a reference file like ADM's: statistics of all images, and 10,000 of them, evenly spaced."""
    count = min(ref.count, REFERENCE_IMAGES)
    chosen = np.arange(count) * ref.count // count
    statistics = {}
    for name, (mu, sigma, _) in STATISTICS.items():
        statistics |= {mu: gaussians[name].mean, sigma: gaussians[name].covariance}
    images = ref.images.read(chosen[batch] for batch in in_batches(count, BATCH))
    save_npz(path, (count, *ref.images.size, 3), images, **statistics, n=np.array(ref.count))
    print(f"Wrote {path}: statistics of {ref.count:,} images, and {count:,} of them")


def open_set(source: str, title: str, data_root: str = "data", size: tuple[int, int] | None = None,
             split: str = "val") -> ImageSet:
    """Open an `.npz` like ADM's, a folder of pictures, or the part `split` of a named data set.

    Args:
        title: what the user calls the set, for errors.
        size: (H, W) to resize a named set to, and to crop a folder of pictures to. An `.npz` is left as it is.
    """
    path, statistics, count = Path(source), {}, None
    if source in NAMED:
        images = NamedImages(load_dataset(source, size and size[0], data_root, split))
    elif path.is_dir():
        images = PictureFolder(path, title, size)
    elif path.is_file():
        with damage_as_oserror(f"{title} {source}"), zipfile.ZipFile(path) as file:
            names = set(array_names(file))
        statistics, count = read_statistics(path, title, names)
        images = None if statistics and "arr_0" not in names else NpzImages(path, title)
    else:
        raise FileNotFoundError(f"{title} {source} does not exist; expected an .npz, a folder of images, or one of "
                                f"{', '.join(NAMED)}")
    if images and len(images) < 4:
        raise UserError(f"{title} {source} has {len(images)} images; expected at least 4, so that each has a third neighbour")
    return ImageSet(title, source, images, statistics, count)


class PictureFolder:
    """All pictures of a folder and its sub-folders as RGB, in the order of their paths.

    Args:
        size: (H, W) of the other side. If any picture has another size, all are cropped to it as training does.
    """

    labels = None

    def __init__(self, path: Path, title: str, size: tuple[int, int] | None = None):
        self.paths = sorted(find_files(path, EXTENSIONS))
        if not self.paths:
            raise FileNotFoundError(f"{title} {path}: the folder holds no images ({' '.join(EXTENSIONS)})")
        if len(parts := parts_among({file.relative_to(path).parts[0] for file in self.paths})) > 1:
            raise UserError(f"{title} {path} holds the parts {', '.join(parts)} of a data set; name one of them, such as "
                            f"{path / parts[-1]}")
        self.threads = ThreadPoolExecutor()  # decoding pictures releases Python's lock
        sizes = dict(zip(self.paths, self.threads.map(picture_size, self.paths)))
        self.size = size or sizes[self.paths[0]]
        different = [picture for picture in self.paths if sizes[picture] != self.size]
        self.cropped = bool(different)
        if different and (size is None or size[0] != size[1]):
            height, width = sizes[different[0]]
            raise UserError(f"{title} {path}: the images must be of one size, or be cropped to a square by `image_size`; "
                            f"expected {self.size[1]}x{self.size[0]}, {different[0].relative_to(path)} is {width}x{height} "
                            "(width x height)")

    def __len__(self) -> int:
        return len(self.paths)

    def sha256(self) -> str:
        return hashlib.sha256("".join(f"{found}\n" for found in self.threads.map(sha256, self.paths)).encode()).hexdigest()

    def picture(self, index: int) -> np.ndarray:
        image = open_rgb(self.paths[index])
        return center_crop(image, self.size[0]) if self.cropped else np.asarray(image)

    def read(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for indices in batches:
            yield np.stack(list(self.threads.map(self.picture, indices)))


class NamedImages:
    """A named data set. Greyscale images become RGB, as in sample_ddp.py's output."""

    def __init__(self, dataset: ArrayImages):
        self.images, self.labels, self.size = dataset.images, dataset.labels.numpy(), dataset.image_size
        self.remarks = getattr(dataset, "remarks", [])

    def __len__(self) -> int:
        return len(self.images)

    def sha256(self) -> str:
        return hashlib.sha256(self.images.contiguous().numpy()).hexdigest()

    def read(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for indices in batches:
            yield self.images[indices].permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()


def picture_size(path: Path) -> tuple[int, int]:
    """(H, W), without reading the pixels."""
    with picture(path) as image:
        return upright_size(image)
