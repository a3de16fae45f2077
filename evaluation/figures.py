"""The reported figures, each with its floor: the same figure of real images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.extractors import STAND_INS
from evaluation.image_sets import STATISTICS, ImageSet
from evaluation.metrics import Gaussian, frechet_distance, precision_and_recall
from evaluation.survey import Survey, survey, survey_floor, survey_nearest
from runtime.processes import World

ENOUGH = 50_000  # images behind a published FID


@dataclass
class Figure:
    """`floor`: the same figure of real images, and the number of these images."""

    name: str
    value: float | None
    remark: str = ""
    floor: float | None = None
    floor_of: str = ""


def measure(ref: ImageSet, samples: ImageSet, training: ImageSet | None, seen: Survey, extractors: dict[str, Callable],
            world: World, inception: bool, pr_precision: str = "adm", progress: Callable[[], object] = lambda: None,
            ) -> list[Figure]:
    """All figures of a set of samples, on every process.

    Args:
        training: images for the check of memorisation, or None.
        seen: the survey of `ref`, which has kept "pool" (and "pixels" with `training`).
        inception: whether ADM's figures are asked for; `extractors` lacks their network where both sides have statistics only.
        progress: see `survey`.
    """
    drawn = survey(samples, extractors, world, kept_of(training), progress=progress)
    floor = survey_floor(ref, samples, training, seen, extractors, world, progress)
    nearest = survey_nearest(training, [seen, drawn], world) if training else None
    return world.on_main(lambda: [
        *(inception_figures(ref, samples, seen, drawn, pr_precision, world.device) if inception else ()),
        *stand_in_figures(seen, drawn, floor, extractors),
        *(memorisation_figures(nearest) if nearest else ())])


def kept_of(training: ImageSet | None) -> list[str]:
    """The features of which every single one is needed."""
    return ["pool", "pixels"] if training else ["pool"]


def protocol(made: dict[str, Any], ref: str, ref_sha256: str) -> str:
    """What decides a figure, in one line fit for a paper.

    Args:
        made: how the samples were drawn, as in NAME.json. What an older version did not write is left out.
        ref, ref_sha256: the reference.
    """
    def hashed(name: str, sha256: str | None, *also: str) -> str:
        inside = ", ".join([*([f"sha256 {sha256[:16]}"] if sha256 else []), *also])
        return f"{name} ({inside})" if inside else name

    made = dict(made)
    take = made.pop
    scale, channels, interval = take("cfg_scale", 1.0), take("cfg_channels", None), take("guidance_interval", None)
    limits = "at all t" if interval is None else "at t {:g}..{:g}".format(*interval)
    weights, identity, versions = take("weights", None), take("vae_identity", {}), take("versions", {})
    parts = [
        f"N = {take('images', 0):,}", f"reference {hashed(ref, ref_sha256)}",
        hashed(take("checkpoint"), take("checkpoint_sha256", None), *([weights.replace("ema", "EMA")] if weights else [])),
        f"sampler {take('sampler')}, {take('steps')} steps",
        "no classifier-free guidance" if scale == 1 else f"guidance {scale:g} of {channels} channels {limits}",
        f"{take('labels')} labels, seed {take('seed')}", take("precision") + (" (TF32 allowed)" if take("tf32", False) else ""),
        f"decoder {hashed(str(take('vae', 'unknown')), identity.get('sha256') or identity.get('vae_sha256'))}"]
    told = ("model", "image_size", "statistics", "objective")  # by the checkpoint
    further = [f"{name} {value}" for name, value in made.items() if name not in told and value not in (None, False, "none")]
    return ", ".join([*parts, *further, *(f"{name} {value}" for name, value in versions.items())])


def inception_figures(ref: ImageSet, samples: ImageSet, seen: Survey, drawn: Survey, pr_precision: str,
                      device: torch.device) -> list[Figure]:
    """ADM's five figures. A figure that cannot be computed from a side's statistics has no value, and says why."""
    real = seen.gaussians(STATISTICS) | ref.statistics
    fake = drawn.gaussians(STATISTICS) | samples.statistics
    few = samples.count is not None and samples.count < ENOUGH
    label, remark = (f"-{samples.count}", f"biased upwards, as N is below {ENOUGH:,}") if few else ("", "")
    if samples.count is None:
        remark = "of an unknown number of samples: the statistics do not say how many"
    figures = []
    for name, title in (("pool", "FID"), ("spatial", "sFID")):
        if name in real and name in fake:
            figures.append(Figure(f"{title}{label}", frechet_distance(real[name], fake[name]), remark))
        else:
            lacking = " and ".join(side.title for side, has in ((ref, real), (samples, fake)) if name not in has)
            figures.append(Figure(title, None, f"skipped: {lacking} lacks {' and '.join(STATISTICS[name][:2])}"))
    without = " and ".join(side.title for side in (ref, samples) if side.images is None)
    skipped = f"skipped: statistics without images in {without}"
    if samples.images:
        figures.append(Figure("Inception Score", drawn.inception_score.value(), f"of {len(samples.images):,} images"))
    if without:
        titles = ("Precision", "Recall") if samples.images else ("Inception Score", "Precision", "Recall")
        return [*figures, *(Figure(title, None, skipped) for title in titles)]
    near = precision_and_recall(seen.features("pool").to(device), drawn.features("pool").to(device), pr_precision)
    remark = f"of {len(ref.images):,} real images and {len(samples.images):,} samples, {pr_precision} distances"
    return [*figures, *(Figure(title, share, remark) for title, share in zip(("Precision", "Recall"), near))]


def stand_in_figures(seen: Survey, drawn: Survey, floor: tuple[Survey, Survey, str] | None,
                     extractors: dict[str, Callable]) -> list[Figure]:
    """FD-pixel32, FD-classifier and label accuracy, as far as `extractors` has what they need."""
    figures = []
    about = extractors["classifier"].about if "classifier" in extractors else {}
    remark = about and f"{about['path']}, sha256 {about['sha256']}, test accuracy {about['test_accuracy']:.4f}"
    for name, title in STAND_INS.items():
        if name in extractors and floor:
            first, rest, count = floor
            gaussians = {side: side.covariances[name].gaussian() for side in (seen, drawn, first, rest)}
            if name == "pixels":
                dimensions = distinct_channels(gaussians[seen], gaussians[drawn])
                gaussians = {side: gaussian.at(dimensions) for side, gaussian in gaussians.items()}
            of = f"of {drawn.covariances[name].count:,} samples and {seen.covariances[name].count:,} real images"
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


def distinct_channels(a: Gaussian, b: Gaussian) -> np.ndarray:
    """The dimensions of pixels to compare. Channels that are equal in all images of both sets count once.

    Such channels have the same mean and the same covariance with every pixel; the variance of their difference is then 0.
    """
    channels = np.arange(len(a.mean)).reshape(3, -1)

    def equal(c: np.ndarray, d: np.ndarray) -> bool:
        return all(np.allclose(g.mean[c], g.mean[d]) and np.allclose(g.covariance[c], g.covariance[d]) for g in (a, b))

    return np.concatenate([c for i, c in enumerate(channels) if not any(equal(c, d) for d in channels[:i])])


def memorisation_figures(nearest: list[Tensor]) -> list[Figure]:
    """Distances to the nearest training image. Copies of training images are nearer to it than held-out images are."""
    held_out, samples = nearest
    count, near = f"REF, N = {len(held_out):,}", held_out.quantile(0.01)
    remark = "root mean square of pixels in [-1, 1]"
    share, share_remark = (samples < near).double().mean().item(), "share of the samples"
    if near < 1e-6:
        share, share_remark = None, "no figure: more than 1 % of REF are copies of training images, so not held out"
    return [
        Figure("Nearest training image, median", samples.median().item(), remark, held_out.median().item(), count),
        Figure("Nearer than 99 % of held-out", share, share_remark, (held_out < near).double().mean().item(), count)]
