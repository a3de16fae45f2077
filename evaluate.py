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
from data import NAMED, array_names, in_batches, open_images, save_npz, told_as_damage
from metrics import (
    Classifier,
    Gaussian,
    Inception,
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
    parser.add_device_argument()
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
    floor = survey_floor(ref, samples, training, seen, extractors, world)
    nearest = survey_nearest(training, [seen, drawn], world) if training else None
    figures = world.on_main(lambda: [
        *(inception_figures(ref, samples, seen, drawn, args.pr_precision, world.device) if args.weights != "none" else ()),
        *stand_in_figures(seen, drawn, floor, extractors),
        *(memorisation_figures(nearest) if nearest else ())])
    report = {
        "ref": ref.describe(), "samples": samples.describe(), "training_images": training and training.describe(),
        "weights": checkpoint.INCEPTION_SHA256 if "inception" in extractors else None,
        "classifier": extractors["classifier"].about if "classifier" in extractors else None,
        "pr_precision": args.pr_precision, "figures": [asdict(figure) for figure in figures],
        "seconds": round(time.perf_counter() - start, 1), "processes": world.size,
        "peak_memory_gib": round(runtime.peak_memory(world.device), 2)}
    if world.is_main:
        print(*(side.say() for side in (ref, samples, training) if side), *say(figures), sep="\n")
        print(f"{report['seconds']} s, {report['peak_memory_gib']} GiB at most; processes: {world.size}")
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
    statistics_of: int | None = None  # so many images, where the file tells

    @property
    def count(self) -> int | None:
        """Of how many images FID is; None where nobody knows."""
        return self.statistics_of if self.statistics else len(self.images)

    def describe(self) -> dict:
        count, size = (len(self.images), list(self.images.size)) if self.images else (None, None)
        return {"source": self.source, "images": count, "size": size, "statistics": bool(self.statistics),
                "statistics_of": self.statistics_of}

    def say(self) -> str:
        """How many images the figures are about."""
        said = ["N = {:,} of {}x{} (height x width)".format(len(self.images), *self.images.size)] if self.images else []
        if self.statistics:
            count = "an unknown number of" if self.statistics_of is None else f"{self.statistics_of:,}"
            said.append(f"statistics of {count} images")
        return f"{self.flag} {self.source}: {', '.join(said)}"


def open_sets(args) -> tuple[ImageSet, ImageSet | None, ImageSet | None]:
    """REF, SAMPLES and --training-images. What is wrong with them, and with what is asked of them, is found here."""
    if args.samples is None and (not args.save_stats or args.classifier or args.training_images or args.json):
        raise ValueError("SAMPLES is missing; only with --save-stats, and nothing else to measure, is REF enough")
    if args.save_stats and args.weights == "none":
        raise ValueError("--save-stats writes statistics of Inception's features; --weights none leaves them out")
    sources = [Path(source).resolve() for source in (args.ref, args.samples, args.training_images) if source]
    if args.save_stats and Path(args.save_stats).resolve() in sources:
        raise ValueError(f"--save-stats {args.save_stats} would overwrite its own images; name another file")
    if args.training_images and args.ref not in NAMED and sources[0] == sources[-1]:
        raise ValueError(f"--training-images {args.training_images} is REF; the check needs held-out images for REF")
    runtime.check_output("--json", args.json, ".json")
    samples = open_set(args.samples, "SAMPLES", args) if args.samples else None
    size = samples.images.size if samples and samples.images else None
    ref = open_set(args.ref, "REF", args, size)
    training = open_set(args.training_images, "--training-images", args, size, "train") if args.training_images else None
    if args.save_stats and ref.statistics:
        raise ValueError(f"--save-stats: REF {ref.source} holds statistics already")
    if args.save_stats:
        count, (height, width) = min(len(ref.images), REFERENCE_IMAGES), ref.images.size
        runtime.check_output("--save-stats", args.save_stats, ".npz", count * height * width * 3)
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
        with told_as_damage(f"{flag} {source}"), zipfile.ZipFile(path) as file:
            names = set(array_names(file))
        if names & {"mu", "sigma", "mu_s", "sigma_s"}:
            statistics, count = read_statistics(path, flag, names)
            if "arr_0" not in names:
                return ImageSet(flag, source, None, statistics, count)
    images = open_images(source, flag, size, args.data_root, split)
    if len(images) < 4:
        raise ValueError(f"{flag} {source} has {len(images)} images; expected at least 4, for a third neighbour")
    return ImageSet(flag, source, images, statistics, count)


def read_statistics(path: Path, flag: str, names: set[str]) -> tuple[dict[str, Gaussian], int | None]:
    """ADM's statistics in an `.npz`, and of how many images they are, where `n` tells it."""
    statistics = {}
    with told_as_damage(f"{flag} {path}"), np.load(path, allow_pickle=False) as file:
        for name, (mu, sigma, dimensions) in STATISTICS.items():
            if not {mu, sigma} & names:
                continue
            try:
                mean, covariance = (np.asarray(file[key], dtype=np.float64) for key in (mu, sigma))
                count = int(file["n"]) if "n" in names else None
            except (KeyError, ValueError, TypeError) as error:  # missing, or objects, which are not unpickled
                raise ValueError(f"{flag} {path}: {mu}, {sigma} and n cannot be read as numbers: {error}") from None
            if mean.shape != (dimensions,) or covariance.shape != (dimensions, dimensions):
                raise ValueError(f"{flag} {path}: {mu} is {mean.shape} and {sigma} {covariance.shape}; expected "
                                 f"({dimensions},) and ({dimensions}, {dimensions})")
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise ValueError(f"{flag} {path}: {mu} or {sigma} has values that are not finite")
            if not np.allclose(covariance, covariance.T):
                raise ValueError(f"{flag} {path}: {sigma} is not symmetric, and no covariance")
            statistics[name] = Gaussian(mean, covariance)
    return statistics, count


def save_statistics(path: Path, ref: ImageSet, seen: "Survey") -> None:
    """A reference file as ADM publishes: statistics of all images, and 10,000 of them, evenly spaced."""
    count = min(ref.count, REFERENCE_IMAGES)
    chosen = np.arange(count) * ref.count // count
    statistics = {}
    for name, (mu, sigma, _) in STATISTICS.items():
        gaussian = seen.moments[name].gaussian()
        statistics |= {mu: gaussian.mean, sigma: gaussian.covariance}
    images = ref.images.read(chosen[batch] for batch in in_batches(count, BATCH))
    save_npz(path, (count, *ref.images.size, 3), images, **statistics, n=np.array(ref.count))
    print(f"Wrote {path}: statistics of {ref.count:,} images, and {count:,} of them")


# --- features of images: (B, H, W, 3) uint8 -> {name: (B, D)} ----------------------------------------


def pixels(images: Tensor) -> Tensor:
    """-> (B, 3, h, w)"""
    return pixel_features(images.permute(0, 3, 1, 2))


def flat_pixels(images: Tensor) -> dict[str, Tensor]:
    """Channel by channel."""
    return {"pixels": pixels(images).flatten(1)}


class ClassifierFeatures:
    """Features and predictions of a classifier that benchmarks/classifier.py trained."""

    def __init__(self, path: str, size: tuple[int, int], device: torch.device):
        state = checkpoint.load(path, "--classifier")
        if "classifier" not in state:
            raise ValueError(f"--classifier {path} was not written by benchmarks/classifier.py")
        spec = state["spec"]
        own, given = tuple(spec["size"]), tuple(pixels(torch.zeros(1, *size, 3, dtype=torch.uint8)).shape[2:])
        if own != given:
            raise ValueError(f"--classifier {path} was trained on images of {own[0]}x{own[1]}; these are {given[0]}x{given[1]}")
        self.network = Classifier(**spec["network"])
        checkpoint.load_weights(self.network, state["classifier"], Path(path))
        self.network.to(device).eval()
        self.about = {"path": path, "sha256": checkpoint.digest(Path(path)),
                      **{key: spec[key] for key in ("data", "test_images", "test_accuracy")}}

    def check_labels(self, samples: ImageSet) -> None:
        """ValueError where a label is none of the classifier's; wrong arrays of labels are found here, too."""
        labels, count = samples.images and samples.images.labels, self.network.head.out_features
        if labels is not None and not (0 <= labels.min() and labels.max() < count):
            raise ValueError(f"{samples.flag} {samples.source}: arr_1 holds labels from {labels.min()} to {labels.max()}; the "
                             f"classifier has {count} classes, 0..{count - 1}")

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features = self.network.features(pixels(images))
        return {"classifier": features, "predictions": self.network.head(features).argmax(dim=1)}


def open_extractors(args, ref: ImageSet, samples: ImageSet, device: torch.device) -> dict[str, Callable]:
    """By name, those that the flags ask for, where there are images to see."""
    extractors = {}
    seen = samples.images or ref.images
    if args.classifier:
        if seen is None:
            raise ValueError("--classifier needs images; REF and SAMPLES hold statistics")
        classifier = extractors["classifier"] = ClassifierFeatures(args.classifier, seen.size, device)
        classifier.check_labels(samples)
    if args.weights == "none" or args.training_images:
        extractors["pixels"] = flat_pixels
    if args.weights != "none" and seen:
        extractors["inception"] = Inception(checkpoint.inception_weights(args.weights), device)
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
                self.inception_score.update(positions, values.cpu())
            elif name == "predictions":
                if labels is not None:
                    self.correct += int((values.cpu().numpy() == labels).sum())
                    self.labelled += len(labels)
            else:
                self.moments.setdefault(name, Moments(values.shape[1], values.device)).update(values)
                if name in kept:
                    self.kept[name].append((positions[0], values.cpu()))

    def cpu(self) -> "Survey":
        """Itself, ready to travel."""
        self.moments = {name: moments.cpu() for name, moments in self.moments.items()}
        return self

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
    labels = image_set.images.labels if "classifier" in extractors else None
    for positions, images in read_batches(image_set.images, indices, world, title or image_set.flag):
        features = {}
        for extract in extractors.values():
            features |= extract(images)
        own.update(positions, images, None if labels is None else labels[indices[positions]], features, kept)
    whole = Survey()
    for part in world.gather(own.cpu()):
        whole.merge(part)
    return whole


def read_batches(images, indices: np.ndarray, world: runtime.World, title: str) -> Iterator[tuple[np.ndarray, Tensor]]:
    """This process's batches of images: (their positions among `indices`, (B, H, W, 3) uint8 on the device).

    One batch is read while another is worked on.
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
                 world: runtime.World) -> tuple[Survey, Survey, str] | None:
    """Real images against real ones: as many training images as samples against REF, or without those, two parts of REF.

    Returns: both, and how many images are in each; None where there is nothing to compare.
    """
    extractors = {name: extract for name, extract in extractors.items() if name in STAND_INS}
    if not extractors or ref.images is None or samples.images is None:
        return None
    real, most = (training, len(training.images)) if training else (ref, len(ref.images) // 2)
    order = torch.randperm(len(real.images), generator=runtime.generator("floor")).numpy()
    count = min(len(samples.images), most)
    first = survey(real, extractors, world, indices=np.sort(order[:count]), title="real images")
    rest = seen if training else survey(real, extractors, world, indices=np.sort(order[count:]), title="real images")
    return first, rest, f"N = {count:,} against {len(ref.images) if training else len(order) - count:,}"


def survey_nearest(training: ImageSet, surveys: list[Survey], world: runtime.World) -> list[Tensor]:
    """For each survey of pixels, the distances (N,) of its images to the nearest training image; on the main process."""
    features = world.on_main(lambda: [one.features("pixels") for one in surveys])
    nearest = Nearest(torch.cat(features))
    for _, images in read_batches(training.images, np.arange(len(training.images)), world, training.flag):
        nearest.update(flat_pixels(images)["pixels"].cpu())
    for part in world.gather(nearest.squares)[1:]:
        nearest.squares = nearest.squares.minimum(part)
    return list(nearest.distances().split([len(part) for part in features]))


# --- figures -------------------------------------------------------------------------------------


@dataclass
class Figure:
    """`floor`: the same figure of real images, and of how many."""

    name: str
    value: float | None
    remark: str = ""
    floor: float | None = None
    floor_of: str = ""


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
    skipped = f"skipped: statistics without images in {without}"
    if samples.images:
        figures.append(Figure("Inception Score", drawn.inception_score.value(), f"of {len(samples.images):,} images"))
    else:
        figures.append(Figure("Inception Score", None, skipped))
    if without:
        return [*figures, Figure("Precision", None, skipped), Figure("Recall", None, skipped)]
    near = precision_and_recall(seen.features("pool").to(device), drawn.features("pool").to(device), pr_precision)
    remark = f"of {len(ref.images):,} real images and {len(samples.images):,} samples, {pr_precision} distances"
    return [*figures, *(Figure(title, share, remark) for title, share in zip(("Precision", "Recall"), near))]


def stand_in_figures(seen: Survey, drawn: Survey, floor: tuple[Survey, Survey, str] | None,
                     extractors: dict[str, Callable]) -> list[Figure]:
    figures = []
    about = extractors["classifier"].about if "classifier" in extractors else {}
    remark = about and f"{about['path']}, sha256 {about['sha256']}, test accuracy {about['test_accuracy']:.4f}"
    for name, title in STAND_INS.items():
        if name in extractors and floor:
            first, rest, count = floor
            gaussians = {side: side.moments[name].gaussian() for side in (seen, drawn, first, rest)}
            if name == "pixels":
                shown = distinct(seen, drawn, len(gaussians[seen].mean))
                gaussians = {side: gaussian.at(shown) for side, gaussian in gaussians.items()}
            of = f"of {drawn.moments[name].count:,} samples and {seen.moments[name].count:,} real images"
            fewer = "" if rest is seen else "; real images of fewer, and so higher (--training-images: of as many)"
            figures.append(Figure(title, frechet_distance(gaussians[seen], gaussians[drawn]),
                                  f"{of}{fewer}{f'; {remark}' if name == 'classifier' else ''}",
                                  frechet_distance(gaussians[first], gaussians[rest]), count))
        elif name in extractors:
            figures.append(Figure(title, None, "skipped: statistics without images in REF or SAMPLES"))
    if about:
        share = drawn.correct / drawn.labelled if drawn.labelled else None
        figures.append(Figure("Label accuracy", share, remark if drawn.labelled else "skipped: no labels (arr_1) in SAMPLES",
                              about["test_accuracy"], f"the classifier's test part, N = {about['test_images']:,}"))
    return figures


def distinct(a: Survey, b: Survey, dimensions: int) -> np.ndarray:
    """The dimensions of pixels to be compared: channels that are equal throughout both sets are counted once."""
    channels = np.arange(dimensions).reshape(3, -1)
    return channels[[c for c in range(3) if not any(a.equal[e, c] and b.equal[e, c] for e in range(c))]].ravel()


def memorisation_figures(nearest: list[Tensor]) -> list[Figure]:
    """Distances to the nearest training image; a network that copies is nearer to it than held-out images are."""
    held_out, samples = nearest
    count, bound = f"REF, N = {len(held_out):,}", held_out.quantile(0.01)
    remark = "root mean square of pixels in [-1, 1]"
    share, doubt = (samples < bound).double().mean().item(), "share of the samples"
    if bound < 1e-6:
        share, doubt = None, "no figure: more than 1 % of REF are copies of training images, and not held out"
    return [
        Figure("Nearest training image, median", samples.median().item(), remark, held_out.median().item(), count),
        Figure("Nearer than 99 % of held-out", share, doubt, (held_out < bound).double().mean().item(), count)]


def say(figures: list[Figure]) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{round(value, 4) + 0.0:.4f}"  # + 0.0: no "-0.0000"

    width = max(len(figure.name) for figure in figures)
    lines = []
    for figure in figures:
        floor = "" if figure.floor is None else f"   real images: {number(figure.floor)} ({figure.floor_of})"
        lines.append(f"{figure.name:<{width}}  {number(figure.value):>9}{floor}   {figure.remark}".rstrip())
    return lines


if __name__ == "__main__":
    runtime.run(main, build_parser())
