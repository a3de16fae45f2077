"""How far samples are from real images: two sets of images -> metrics.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples/X.npz           # FID, sFID, IS, precision, recall, as ADM's
    torchrun --nproc_per_node=8 evaluate.py REF SAMPLES --json figures.json
    python evaluate.py IMAGES --save-stats ref.npz                             # a reference file of any set of images
    python evaluate.py digits samples/X.npz --weights none --classifier classifier.pt --training-images digits

A set is an `.npz` of images (`arr_0` uint8 NHWC, as sample_ddp.py writes), a folder of images, an `.npz` of statistics
(`mu, sigma, mu_s, sigma_s`, with or without images), or the held-out part of digits, mnist or cifar10.

- FID, sFID, Inception Score, Precision, Recall: as ADM's TensorFlow suite defines them (Dhariwal & Nichol,
  arXiv:2105.05233), on torch-fidelity's port of its Inception.
- FD-pixel32 and FD-classifier: the same Fréchet distance, of pixels averaged to at most 32x32 and of a small classifier's
  features. No download, and not FID: each prints how far real images are from real ones.
- Memorisation: how far samples are from the nearest training image, and how far held-out images are.
"""

import itertools
import json
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import runtime
from autoencoders import to_unit_range
from data import open_images, save_npz, told_as_damage
from metrics import (
    Classifier,
    Gaussian,
    InceptionScore,
    Moments,
    Nearest,
    frechet_distance,
    pixel_features,
    precision_and_recall,
)

BATCH = 64  # images an extractor sees at once, the same ones on any number of processes
ENOUGH = 50_000  # images of a published FID
STATISTICS = {"pool": ("mu", "sigma", 2048), "spatial": ("mu_s", "sigma_s", 17 * 17 * 7)}  # names in a reference, and D
REFERENCE_IMAGES = 10_000  # in a reference file, for precision and recall
STAND_INS = {"pixels": "FD-pixel32", "classifier": "FD-classifier"}


def build_parser() -> runtime.ArgumentParser:
    parser = runtime.ArgumentParser("Measure how far samples are from real images.")
    parser.add_argument("ref", help="real images: .npz, folder, .npz of statistics, or digits, mnist, cifar10 (held-out part)")
    parser.add_argument("samples", type=str | None, nargs="?", help="likewise")
    parser.add_argument("--weights", type=str | None,
                        help=f"{checkpoint.INCEPTION}; default: torch's cache, or a download; none: FD-pixel32 in its place")
    parser.add_argument("--pr-precision", choices=["adm", "fp32"], default="adm",
                        help="of distances for precision and recall: ADM's fp16, or fp32")
    parser.add_argument("--classifier", type=str | None,
                        help="from benchmarks/classifier.py: FD-classifier, and label accuracy of samples with arr_1")
    parser.add_argument("--training-images", type=str | None,
                        help="a set the samples' model was trained on: the memorisation check (REF then is held-out images)")
    parser.add_argument("--save-stats", type=str | None, help=".npz for the statistics of REF; SAMPLES may then be left out")
    parser.add_argument("--json", type=str | None, help="file for the figures")
    parser.add_argument("--data-root", default="data", help="where named data sets lie")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda where there is one, else cpu")
    return parser


def main(args) -> None:
    torch.set_grad_enabled(False)
    world, start = runtime.start_world(args.device), time.perf_counter()
    exact_products()
    ref, samples, training = world.main_first(lambda: open_sets(args))
    extractors = world.main_first(lambda: open_extractors(args, ref, samples or ref, world.device))
    kept = [name for name, needed in {"pool": samples, "pixels": training}.items() if needed]

    seen = survey(ref, extractors, world, kept)
    if args.save_stats:
        world.on_main(lambda: save_statistics(Path(args.save_stats), ref, seen))
    if samples is None:
        return
    drawn = survey(samples, extractors, world, kept)
    floor = survey_floor(ref, training, len(samples.images or ()), seen, extractors, world)
    nearest = survey_nearest(training, [seen, drawn], world) if training else None
    figures = world.on_main(lambda: [
        *(inception_figures(ref, samples, seen, drawn, args.pr_precision, world.device) if "inception" in extractors else ()),
        *stand_in_figures(seen, drawn, floor, extractors),
        *(memorisation_figures(nearest) if nearest else ())])
    report = {
        "ref": ref.describe(), "samples": samples.describe(), "training_images": training and training.describe(),
        **{name: extractor.about for name, extractor in extractors.items() if extractor.about},
        "pr_precision": args.pr_precision, "figures": [asdict(figure) for figure in figures],
        "seconds": round(time.perf_counter() - start, 1), "processes": world.size,
        "peak_memory_gib": round(runtime.peak_memory(world.device), 2)}
    if world.is_main:
        print(*say(report, figures), sep="\n")
        if args.json:
            checkpoint.replace_text(Path(args.json), json.dumps(report, indent=2) + "\n")
            print(f"Wrote {args.json}")


def exact_products() -> None:
    """fp32 is fp32, on every device."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


# --- the sets ------------------------------------------------------------------------------------


@dataclass
class ImageSet:
    """One side of a comparison: images, or statistics of Inception's features, or both."""

    flag: str
    source: str
    images: object | None  # see data.open_images
    statistics: dict[str, Gaussian] = field(default_factory=dict)
    count: int | None = None  # of the images that the figures are about; None: the statistics do not tell

    def describe(self) -> dict:
        return {"source": self.source, "images": self.count, "statistics": bool(self.statistics),
                "size": self.images and list(self.images.size)}


def open_sets(args) -> tuple[ImageSet, ImageSet | None, ImageSet | None]:
    """REF, SAMPLES and --training-images. What is wrong with them, and with what is asked of them, is found here."""
    if args.samples is None and not args.save_stats:
        raise ValueError("SAMPLES is missing; only with --save-stats is REF enough")
    for flag, path, suffix in (("--save-stats", args.save_stats, ".npz"), ("--json", args.json, ".json")):
        if path:
            if Path(path).suffix != suffix:
                raise ValueError(f"{flag} {path} is not the name of a {suffix}")
            runtime.check_writable(Path(path).parent)
    samples = open_set(args.samples, "SAMPLES", args) if args.samples else None
    size = samples.images.size if samples and samples.images else None
    ref = open_set(args.ref, "REF", args, size)
    training = open_set(args.training_images, "--training-images", args, size, "train") if args.training_images else None
    if args.save_stats and ref.statistics:
        raise ValueError(f"--save-stats: REF {ref.source} holds statistics already")
    for one in filter(None, (ref, samples, training)):
        if one.images is None and (args.weights == "none" or args.training_images):
            raise ValueError(f"{one.flag} {one.source} holds statistics of Inception's features, without images; "
                             f"{'--weights none' if args.weights == 'none' else '--training-images'} needs images")
        if one.images and size and one.images.size != size:
            raise ValueError(f"SAMPLES are {size[0]}x{size[1]} (height x width), the images of {one.flag} "
                             f"{one.images.size[0]}x{one.images.size[1]}; expected one size")
    return ref, samples, training


def open_set(source: str, flag: str, args, size: tuple[int, int] | None = None, split: str = "val") -> ImageSet:
    statistics, count, path = {}, None, Path(source)
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            names = {name.removesuffix(".npy") for name in file.namelist()}
        if names & {"mu", "sigma", "mu_s", "sigma_s"}:
            statistics, count = read_statistics(path, flag, names)
            if "arr_0" not in names:
                return ImageSet(flag, source, None, statistics, count)
    images = open_images(source, flag, size, args.data_root, split)
    if len(images) < 4:
        raise ValueError(f"{flag} {source} has {len(images)} images; expected at least 4, for a third neighbour")
    return ImageSet(flag, source, images, statistics, count if statistics else len(images))


def read_statistics(path: Path, flag: str, names: set[str]) -> tuple[dict[str, Gaussian], int | None]:
    """ADM's statistics in an `.npz`, and of how many images they are, where `n` tells it."""
    statistics = {}
    with told_as_damage(f"{flag} {path}"), np.load(path, allow_pickle=False) as file:
        for name, (mu, sigma, dimensions) in STATISTICS.items():
            if not {mu, sigma} & names:
                continue
            try:
                mean, covariance = (np.asarray(file[key], dtype=np.float64) for key in (mu, sigma))
            except (KeyError, ValueError, TypeError) as error:  # missing, or objects, which are not unpickled
                raise ValueError(f"{flag} {path}: {mu} and {sigma} cannot be read as numbers: {error}") from None
            if mean.shape != (dimensions,) or covariance.shape != (dimensions, dimensions):
                raise ValueError(f"{flag} {path}: {mu} is {mean.shape} and {sigma} {covariance.shape}; expected "
                                 f"({dimensions},) and ({dimensions}, {dimensions})")
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise ValueError(f"{flag} {path}: {mu} or {sigma} has values that are not finite")
            statistics[name] = Gaussian(mean, covariance)
        return statistics, int(file["n"]) if "n" in names else None


def save_statistics(path: Path, ref: ImageSet, seen: "Survey") -> None:
    """A reference file as ADM publishes: statistics of all images, and 10,000 of them, evenly spaced."""
    count = min(ref.count, REFERENCE_IMAGES)
    chosen = np.arange(count) * ref.count // count
    statistics = {}
    for name, (mu, sigma, _) in STATISTICS.items():
        gaussian = seen.moments[name].gaussian()
        statistics |= {mu: gaussian.mean, sigma: gaussian.covariance}
    images = ref.images.read(np.split(chosen, range(BATCH, count, BATCH)))
    save_npz(path, (count, *ref.images.size, 3), images, **statistics, n=np.array(ref.count))
    print(f"Wrote {path}: statistics of {ref.count:,} images, and {count:,} of them")


# --- features of images: (B, H, W, 3) uint8 -> {name: (B, D)} ----------------------------------------


class Inception:
    """ADM's features: `pool_3` (B, 2048); the first 7 channels of `mixed_6/conv`, (B, 17 * 17 * 7) with channels last; and
    1,008 logits without bias. The network and TensorFlow's resize to 299x299 are torch-fidelity's.
    """

    def __init__(self, weights: str | None, device: torch.device):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise ValueError("FID's Inception needs the package torch-fidelity: pip install '.[eval]'; --weights none gives "
                             "figures without it") from None
        file = checkpoint.inception_weights(weights)  # its sha256 is known, so that its pickle is
        self.about = {"weights": file.name, "sha256": checkpoint.INCEPTION_SHA256}
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=file)
        self.network = network.to(device, memory_format=torch.channels_last)
        network.Mixed_6d.branch1x1.register_forward_hook(self.see)

    def see(self, module, inputs, output: Tensor) -> None:
        self.mixed_6 = output

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        pool, logits = self.network(images.permute(0, 3, 1, 2))
        spatial = self.mixed_6[:, :7].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": logits}


class Pixels:
    """Pixels in [-1, 1], averaged to at most 32x32: (B, 3 h w), channel by channel."""

    about = None

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return {"pixels": pixels(images).flatten(1)}


class ClassifierFeatures:
    """Features and predictions of a classifier that benchmarks/classifier.py trained."""

    def __init__(self, path: str, size: tuple[int, int], device: torch.device):
        state = checkpoint.load(path, "--classifier")
        if "classifier" not in state:
            raise ValueError(f"--classifier {path} was not written by benchmarks/classifier.py")
        spec = state["spec"]
        own, given = tuple(spec["size"]), tuple(pixels(torch.zeros(1, *size, 3)).shape[2:])
        if own != given:
            raise ValueError(f"--classifier {path} was trained on images of {own[0]}x{own[1]}; these are {given[0]}x{given[1]}")
        self.network = Classifier(**spec["network"])
        checkpoint.load_weights(self.network, state["classifier"], Path(path))
        self.network.to(device).eval()
        self.about = {"path": path, "sha256": checkpoint.digest(Path(path)),
                      **{key: spec[key] for key in ("data", "test_images", "test_accuracy")}}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features = self.network.features(pixels(images))
        return {"classifier": features, "predictions": self.network.head(features).argmax(dim=1)}


def pixels(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, h, w) in [-1, 1]."""
    return pixel_features(to_unit_range(images.permute(0, 3, 1, 2)))


def open_extractors(args, ref: ImageSet, samples: ImageSet, device: torch.device) -> dict[str, Callable]:
    """By name, those that the flags ask for."""
    extractors = {}
    if args.classifier:
        with_images = samples.images or ref.images
        if with_images is None:
            raise ValueError("--classifier needs images; REF and SAMPLES hold statistics")
        extractors["classifier"] = ClassifierFeatures(args.classifier, with_images.size, device)
    if args.weights == "none" or args.training_images:
        extractors["pixels"] = Pixels()
    if args.weights != "none":
        extractors["inception"] = Inception(args.weights, device)
    elif args.save_stats:
        raise ValueError("--save-stats writes statistics of Inception's features; --weights none leaves them out")
    return extractors


# --- a look at every image -----------------------------------------------------------------------


class Survey:
    """What the extractors saw of a set: filled batch by batch, and merged over processes."""

    def __init__(self):
        self.moments: dict[str, Moments] = {}  # by name of features
        self.kept = defaultdict(list)  # by name, [(position, features of a batch)]
        self.inception_score = InceptionScore()
        self.correct = self.labelled = 0
        self.equal = dict.fromkeys(itertools.combinations(range(3), 2), True)  # channels, throughout

    def update(self, positions: np.ndarray, images: Tensor, labels: np.ndarray | None, features: dict[str, Tensor],
               kept: list[str]) -> None:
        for a, b in self.equal:
            self.equal[a, b] = self.equal[a, b] and bool((images[..., a] == images[..., b]).all())
        for name, values in features.items():
            if name == "logits":
                self.inception_score.update(positions, values)
            elif name == "predictions":
                if labels is not None:
                    self.correct += int((values.numpy() == labels).sum())
                    self.labelled += len(labels)
            else:
                self.moments.setdefault(name, Moments(values.shape[1])).update(values)
                if name in kept:
                    self.kept[name].append((positions[0], values))

    def merge(self, other: "Survey") -> None:
        for name, moments in other.moments.items():
            self.moments.setdefault(name, Moments(len(moments.mean))).merge(moments)
            self.kept[name] += other.kept[name]
        self.inception_score.merge(other.inception_score)
        self.correct, self.labelled = self.correct + other.correct, self.labelled + other.labelled
        self.equal = {pair: equal and other.equal[pair] for pair, equal in self.equal.items()}

    def features(self, name: str) -> Tensor:
        """(N, D), in the order of the images."""
        return torch.cat([features for _, features in sorted(self.kept[name], key=lambda batch: batch[0])])


def survey(image_set: ImageSet, extractors: dict[str, Callable], world: runtime.World, kept: list[str] = (),
           indices: np.ndarray | None = None, title: str = "") -> Survey:
    """Show the images of a set, or some of them, to the extractors: the whole Survey on the main process."""
    own = Survey()
    if image_set.images is None:
        return own
    indices = np.arange(len(image_set.images)) if indices is None else indices
    labels = image_set.images.labels
    for positions, images in read_batches(image_set.images, indices, world, title or image_set.flag):
        features = {}
        for extract in extractors.values():
            features |= {name: value.cpu() for name, value in extract(images).items()}
        own.update(positions, images, None if labels is None else labels[indices[positions]], features, kept)
    whole = Survey()
    for part in world.gather(own):
        whole.merge(part)
    return whole


def read_batches(images, indices: np.ndarray, world: runtime.World, title: str) -> Iterator[tuple[np.ndarray, Tensor]]:
    """This process's batches of images: (their positions among `indices`, (B, H, W, 3) uint8 on the device).

    One batch is read while another is worked on.
    """
    batches = np.split(np.arange(len(indices)), range(BATCH, len(indices), BATCH))[world.rank :: world.size]
    with ThreadPoolExecutor(1) as reader, tqdm(total=len(indices), desc=title, unit="image", disable=not world.is_main) as bar:
        arrays = images.read(indices[batch] for batch in batches)
        coming = reader.submit(next, arrays, None)
        for batch in batches:
            arrived, coming = coming.result(), reader.submit(next, arrays, None)
            yield batch, torch.from_numpy(arrived).to(world.device)
            bar.update(min(len(batch) * world.size, bar.total - bar.n))


def survey_floor(ref: ImageSet, training: ImageSet | None, count: int, seen: Survey, extractors: dict[str, Callable],
                 world: runtime.World) -> tuple[Survey, Survey, int] | None:
    """Real images against real ones: so many training images against REF, or without those, two parts of REF.

    Returns: both, and how many images are in the first; None where the figures need no floor.
    """
    extractors = {name: extract for name, extract in extractors.items() if name in STAND_INS}
    if not extractors or ref.images is None or not count:
        return None
    real, most = (training, len(training.images)) if training else (ref, len(ref.images) // 2)
    order = torch.randperm(len(real.images), generator=runtime.generator("floor")).numpy()
    count = min(count, most)
    first = survey(real, extractors, world, indices=np.sort(order[:count]), title="floor")
    rest = seen if training else survey(real, extractors, world, indices=np.sort(order[count:]), title="floor")
    return first, rest, count


def survey_nearest(training: ImageSet, surveys: list[Survey], world: runtime.World) -> list[Tensor]:
    """For each survey of pixels, the distances (N,) of its images to the nearest training image; on the main process."""
    features = world.on_main(lambda: [one.features("pixels") for one in surveys])
    nearest, extract = Nearest(torch.cat(features)), Pixels()
    for _, images in read_batches(training.images, np.arange(len(training.images)), world, "--training-images"):
        nearest.update(extract(images)["pixels"].cpu())
    for part in world.gather(nearest.squares)[1:]:
        nearest.squares = nearest.squares.minimum(part)
    return list(nearest.distances().split([len(part) for part in features]))


# --- figures -------------------------------------------------------------------------------------


@dataclass
class Figure:
    """`floor`: the same of real images; of `floor_images` of them, where a number has a say."""

    name: str
    value: float | None
    remark: str = ""
    floor: float | None = None
    floor_images: int | None = None


def inception_figures(ref: ImageSet, samples: ImageSet, seen: Survey, drawn: Survey, pr_precision: str,
                      device: torch.device) -> list[Figure]:
    """ADM's five; a figure that a side's statistics do not allow has no value, and says why."""
    theirs, own = ({name: one.gaussian() for name, one in side.moments.items() if name in STATISTICS} for side in (seen, drawn))
    theirs, own = theirs | ref.statistics, own | samples.statistics
    few = samples.count is not None and samples.count < ENOUGH
    label, remark = (f"-{samples.count}", f"biased upwards, as N is below {ENOUGH:,}") if few else ("", "")
    if samples.count is None:
        remark = "of an unknown number of samples: their statistics do not tell"
    figures = []
    for name, title in (("pool", "FID"), ("spatial", "sFID")):
        if name in theirs and name in own:
            figures.append(Figure(f"{title}{label}", frechet_distance(theirs[name], own[name]), remark))
        else:
            lacking = " and ".join(side.flag for side, has in ((ref, theirs), (samples, own)) if name not in has)
            figures.append(Figure(title, None, f"skipped: {lacking} lacks {' and '.join(STATISTICS[name][:2])}"))
    without = " and ".join(side.flag for side in (ref, samples) if side.images is None)
    if samples.images:
        figures.append(Figure("Inception Score", drawn.inception_score.value()))
    else:
        figures.append(Figure("Inception Score", None, "skipped: SAMPLES holds statistics without images"))
    near = (None, None)
    if not without:
        near = precision_and_recall(seen.features("pool").to(device), drawn.features("pool").to(device), pr_precision)
    remark = f"skipped: {without} holds statistics without images" if without else f"distances: {pr_precision}"
    return [*figures, Figure("Precision", near[0], remark), Figure("Recall", near[1], remark)]


def stand_in_figures(seen: Survey, drawn: Survey, floor: tuple[Survey, Survey, int] | None,
                     extractors: dict[str, Callable]) -> list[Figure]:
    figures = []
    about = extractors["classifier"].about if "classifier" in extractors else {}
    remark = about and f"{about['path']}, sha256 {about['sha256']}, test accuracy {about['test_accuracy']:.4f}"
    for name, title in STAND_INS.items():
        if name in extractors and floor:
            first, rest, count = floor
            figures.append(Figure(title, stand_in_distance(name, seen, drawn), remark if name == "classifier" else "",
                                  stand_in_distance(name, first, rest), count))
        elif name in extractors:
            figures.append(Figure(title, None, "skipped: REF or SAMPLES holds statistics without images"))
    if about:
        share = drawn.correct / drawn.labelled if drawn.labelled else None
        figures.append(Figure("Label accuracy", share, remark if drawn.labelled else "skipped: SAMPLES has no labels (arr_1)",
                              about["test_accuracy"], about["test_images"]))
    return figures


def stand_in_distance(name: str, a: Survey, b: Survey) -> float:
    """The Fréchet distance, of pixels in channels that differ: those equal throughout both sets are counted once."""
    gaussians = [side.moments[name].gaussian() for side in (a, b)]
    if name == "pixels":
        channels = np.arange(len(gaussians[0].mean)).reshape(3, -1)
        kept = [c for c in range(3) if not any(a.equal[e, c] and b.equal[e, c] for e in range(c))]
        gaussians = [gaussian.at(channels[kept].ravel()) for gaussian in gaussians]
    return frechet_distance(*gaussians)


def memorisation_figures(nearest: list[Tensor]) -> list[Figure]:
    """Distances to the nearest training image; a network that copies is nearer to it than held-out images are."""
    held_out, samples = nearest
    remark = "root mean square of pixels in [-1, 1], averaged to at most 32x32; floor: held-out images (REF)"
    bound = held_out.quantile(0.01)
    return [
        Figure("Nearest training image, median", samples.median().item(), remark, held_out.median().item(), len(held_out)),
        Figure("Nearer than 99 % of held-out", (samples < bound).double().mean().item(), "share of the samples",
               (held_out < bound).double().mean().item(), len(held_out))]


def say(report: dict, figures: list[Figure]) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    lines = []
    for side in ("ref", "samples", "training_images"):
        if about := report[side]:
            count = "an unknown number of images" if about["images"] is None else f"N = {about['images']:,}"
            lines.append(f"{side}: {about['source']}, {count}{', by their statistics' if about['statistics'] else ''}")
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        floor = "" if figure.floor is None else f"   real images: {number(figure.floor)} (N = {figure.floor_images:,})"
        lines.append(f"{figure.name:<{width}}  {number(figure.value):>9}{floor}   {figure.remark}".rstrip())
    lines.append(f"{report['seconds']} s on {report['processes']} processes, {report['peak_memory_gib']} GiB at most")
    return lines


if __name__ == "__main__":
    runtime.run(main, build_parser())
