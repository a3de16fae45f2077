"""What compare.py compares: tasks and networks, the runs that the results so far call for, the table and the figure."""

import json
import math
import statistics
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from runtime import UserError
from runtime.files import write_text

LRS = (1.5e-3, 3e-3, 6e-3)
SEARCH, CURVE, SEEDS = Fraction(1, 5), (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2)), (0, 1, 2)
GUIDANCE = 1.5  # of the first seed, sampled once more
FIGURES = ("FD-classifier", "FD-pixel32", "Label accuracy", "Nearest training image, median", "Nearer than 99 % of held-out")
Network = tuple[str, dict[str, Any]]  # a preset, and arguments over its own


class Task(NamedTuple):
    """A data set, the budget, and the networks that compete, by family and name."""

    seconds: float
    batch_size: int
    shape: tuple[int, int, int]  # (C, H, W) of what is noised
    data: str                    # flags of train.py; {…} stands for a flag of this script, here and below
    real: tuple[str, str]        # held-out and training images, as evaluate.py names them
    classifier: str              # flags of classifier.py
    families: dict[str, dict[str, Network]]
    follows: dict[str, str] = {}  # a family of one network -> one before it, whose learning rate it takes without a search


TASKS = {
    "cifar": Task(1980, 128, (8, 8, 8), "--data-path {cifar_features}", ("{cifar}/test", "{cifar}/train"),
                  "--data-path {cifar}/train --image-size 32 --epochs 10", {
        "DiT": {"DiT/1 96x3": ("DiT-S/2", dict(patch_size=1, hidden_size=96, depth=3, num_heads=3)),
                "DiT/2 192x5": ("DiT-S/2", dict(hidden_size=192, depth=5, num_heads=3)),
                "DiT/2 256x3": ("DiT-S/2", dict(hidden_size=256, depth=3, num_heads=4))},
        "DiNext": {"DiNext/1 104x4": ("DiNext-S/2", dict(patch_size=1, hidden_size=104, depth=4)),
                   "DiNext/1 128x3": ("DiNext-S/2", dict(patch_size=1, hidden_size=128, depth=3)),
                   "DiNext/2 256x4": ("DiNext-S/2", dict(hidden_size=256, depth=4))},
        "DiNext-U": {"DiNext-U 64": ("DiNext-U-S", dict(hidden_size=64, depths=[1, 2, 3, 2, 1])),
                     "DiNext-U 64 21112": ("DiNext-U-S", dict(hidden_size=64, depths=[2, 1, 1, 1, 2])),
                     "DiNext-U 48 32223": ("DiNext-U-S", dict(hidden_size=48, depths=[3, 2, 2, 2, 3]))},
        "ConvAdaLN": {"ConvAdaLN 96x4": ("ConvAdaLN", dict(hidden_size=96, depth=4))},
        "DiNextV2": {"DiNextV2/1 128x3": ("DiNextV2-S/2", dict(patch_size=1, hidden_size=128, depth=3))},
        "DiT labels": {"DiT/1 96x3 labels": (
            "DiT-S/2", dict(patch_size=1, hidden_size=96, depth=3, num_heads=3, label_std=1.0))}},
        {"DiNextV2": "DiNext", "DiT labels": "DiT"}),
    "mnist16": Task(420, 64, (1, 16, 16), "--data-path mnist --image-size 16 --vae pixels", ("mnist", "mnist"),
                    "--data-path mnist --image-size 16 --epochs 5", {
        "DiT": {"DiT/2 96x4": ("DiT-S/2", dict(hidden_size=96, depth=4, num_heads=3)),
                "DiT/4 192x5": ("DiT-S/4", dict(hidden_size=192, depth=5, num_heads=3))},
        "DiNext": {"DiNext/2 96x5": ("DiNext-S/2", dict(hidden_size=96, depth=5))},
        "DiNext-U": {"DiNext-U 32": ("DiNext-U-S", dict(hidden_size=32, depths=[1, 1, 2, 1, 1]))}}),
    "digits": Task(60, 64, (1, 8, 8), "--data-path digits --vae pixels", ("digits", "digits"),
                   "--data-path digits --epochs 20", {
        "DiT": {"DiT/1 40x2": ("DiT-S/2", dict(patch_size=1, hidden_size=40, depth=2, num_heads=1)),
                "DiT/2 64x4": ("DiT-S/2", dict(hidden_size=64, depth=4, num_heads=2))},
        "DiNext": {"DiNext/2 64x4": ("DiNext-S/2", dict(hidden_size=64, depth=4))},
        "DiNext-U": {"DiNext-U 16": ("DiNext-U-S", dict(hidden_size=16, depths=[1, 1, 1, 1, 1]))}}),
}


# --- which runs --------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One training, its samples and figures."""

    task: str
    stage: str  # "search" of a learning rate and shape, "main", "curve"
    family: str
    network: str
    lr: float
    seed: int
    share: Fraction  # of the budget

    @property
    def name(self) -> str:
        """The name of its JSON and of its folder."""
        share = f"{self.share.numerator}of{self.share.denominator}"
        return f"{self.task}-{self.network.replace(' ', '-').replace('/', '')}-lr{self.lr:g}-seed{self.seed}-{share}"


def plan(task: str, results: dict[str, dict]) -> list[Run]:
    """The runs of a task in their order, as far as the results so far tell which these are."""
    runs, chosen = [], {}
    for family, networks in TASKS[task].families.items():
        if leader := TASKS[task].follows.get(family):
            (network,) = networks
            chosen[family] = chosen[leader] and chosen[leader]._replace(network=network)
            continue
        searched, chosen[family] = search(task, family, list(networks), results)
        runs += searched
    if None in chosen.values():
        return runs

    def of_all(stage: str, seed: int, share: Fraction) -> list[Run]:
        return [Run(task, stage, family, best.network, best.lr, seed, share) for family, best in chosen.items()]

    runs += [run for seed in SEEDS for run in of_all("main", seed, Fraction(1))]
    return runs + [run for share in CURVE for run in of_all("curve", SEEDS[0], share)]


def search(task: str, family: str, networks: list[str], results: dict[str, dict]) -> tuple[list[Run], Run | None]:
    """The runs that seek a family's network and learning rate, and the best of them once all are done."""
    found = [search_rate(task, family, network, results) for network in networks]
    runs, best = [run for own, _ in found for run in own], [run for _, run in found]
    return runs, None if None in best else min(best, key=lambda run: distance(results[run.name]))


def search_rate(task: str, family: str, network: str, results: dict[str, dict]) -> tuple[list[Run], Run | None]:
    """The runs that seek a network's learning rate, and the best of them once it lies inside of the range."""
    rates = list(LRS)
    while True:
        runs = [Run(task, "search", family, network, lr, SEEDS[0], SEARCH) for lr in rates]
        if not all(run.name in results for run in runs):
            return runs, None
        best = min(runs, key=lambda run: distance(results[run.name]))
        if best.lr in sorted(rates)[1:-1]:
            return runs, best
        rates.append(best.lr / 2 if best.lr == min(rates) else best.lr * 2)


def distance(result: dict) -> float:
    return figure(result, FIGURES[0])["value"] if "figures" in result else math.inf


def figure(result: dict, name: str, of: str = "figures") -> dict:
    return next(figure for figure in result[of] if figure["name"] == name)


def read_results(folder: Path) -> dict[str, dict]:
    """By name, all JSON files of --results."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def steps_of(run: Run, results: dict[str, dict]) -> int:
    if run.network not in (times := results.get(f"{run.task}-times", {"networks": {}})["networks"]):
        raise UserError(f"the step time of {run.network} is not known; first run `compare.py time --tasks {run.task}`, "
                        "with the same `results`")
    return round(run.share * TASKS[run.task].seconds / times[run.network]["seconds"])


def hours(run: Run) -> float:
    return float(run.share) * TASKS[run.task].seconds / 3600


def missing_runs(task: str, folder: Path) -> list[Run]:
    results = read_results(folder)
    return [run for run in plan(task, results) if run.name not in results]


# --- report ------------------------------------------------------------------------------------------


def write_report(folder: Path, tasks: list[str]) -> None:
    """Write table.md and compare.png, with those of the tasks that have results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.pyplot import subplots

    results, lines = read_results(folder), []
    runs = {task: done for task in tasks if (done := [run for run in plan(task, results) if run.name in results])}
    if not runs:
        raise UserError(f"`results` {folder} has no result of {' or '.join(tasks)}")
    picture, panels = subplots(1, len(runs), figsize=(5 * len(runs), 4), squeeze=False)
    for (task, done), panel in zip(runs.items(), panels[0]):
        lines += [f"## {task}", "", *main_table(task, done, results), "", *search_table(done, results), ""]
        draw_curves(panel, task, done, results)
    write_text(folder / "table.md", "\n".join(lines))
    picture.tight_layout()
    picture.savefig(folder / "compare.png", dpi=120)


def main_table(task: str, done: list[Run], results: dict[str, dict]) -> list[str]:
    """A row a family: its network, costs and figures, mean and standard deviation over the seeds; then the floors."""
    lines = table_head("network", "M parameters", "MMAC", "ms a step", "steps", "lr", "seeds", *FIGURES, f"guided {GUIDANCE}")
    floors = {}
    for runs in by_family(done, "main").values():
        first, own = runs[0], [results[run.name] for run in runs]
        costs = results[f"{task}-times"]["networks"][first.network]
        values = [[figure(result, name)["value"] for result in own if "figures" in result] for name in FIGURES]
        floors |= {name: figure(result, name)["floor"] for result in own if "figures" in result for name in FIGURES}
        guided = next((figure(result, FIGURES[0], "guided")["value"] for result in own if "guided" in result), None)
        lines.append(row(first.network, f"{costs['parameters'] / 1e6:.2f}", f"{costs['macs'] / 1e6:.1f}",
                         f"{costs['seconds'] * 1e3:.0f}", own[0]["steps"], f"{first.lr:g}", len(runs), *map(spread, values),
                         "-" if guided is None else f"{guided:.3g}"))
    if decoded := results.get(f"{task}-reconstructions"):
        lines.append(row("real images, encoded and decoded", *6 * ["-"],
                         *(f"{figure(decoded, name)['value']:.3g}" for name in FIGURES), "-"))
    return [*lines, row("real images", *6 * ["-"], *(f"{floors[name]:.3g}" if floors else "-" for name in FIGURES), "-")]


def search_table(done: list[Run], results: dict[str, dict]) -> list[str]:
    """FD-classifier after a fifth of the steps, by network and learning rate."""
    runs = [run for run in done if run.stage == "search"]
    rates = sorted({run.lr for run in runs})
    found = {(run.network, run.lr): distance(results[run.name]) for run in runs}
    return [*table_head("a fifth of the steps, lr", *(f"{lr:g}" for lr in rates)),
            *(row(network, *(f"{found[network, lr]:.3g}" if (network, lr) in found else "-" for lr in rates))
              for network in dict.fromkeys(run.network for run in runs))]


def draw_curves(panel, task: str, done: list[Run], results: dict[str, dict]) -> None:
    """FD-classifier over the seconds of training; bars are standard deviations over the seeds. Floors may lie below."""
    panel.set(title=task, xlabel="seconds of training, one CPU core", ylabel=FIGURES[0])
    mains, drawn = by_family(done, "main"), []
    for family, whole in mains.items():
        runs = by_family(done, "curve").get(family, []) + whole
        shares = sorted({run.share for run in runs})
        values = [[distance(results[run.name]) for run in runs if run.share == share] for share in shares]
        panel.errorbar([float(share) * TASKS[task].seconds for share in shares], list(map(statistics.mean, values)),
                       [statistics.stdev(own) if len(own) > 1 else 0 for own in values], marker="o", capsize=4, label=family)
        drawn += [value for own in values for value in own if 0 < value < math.inf]
    draw_floor = partial(panel.axhline, color="gray", linewidth=1)
    if decoded := results.get(f"{task}-reconstructions"):
        draw_floor(distance(decoded), linestyle="--", label=f"encoded, decoded: {distance(decoded):.2g}")
    measured = [results[run.name] for own in mains.values() for run in own if "figures" in results[run.name]]
    for result in measured[:1]:
        floor = figure(result, FIGURES[0])["floor"]
        draw_floor(floor, linestyle=":", label=f"real images: {floor:.2g}")
    if drawn:
        use_log_axes(panel, [float(share) * TASKS[task].seconds for share in (*CURVE, 1)], drawn)
        panel.legend(fontsize="x-small")


def use_log_axes(panel, seconds: list[float], values: list[float]) -> None:
    """Log axes around `values`, with ticks at `seconds`."""
    from matplotlib.ticker import LogLocator

    # Limits come before the scales: matplotlib may divide by 0 for those of a single point.
    panel.set(ylim=(min(values) / 1.3, max(values) * 1.3), xlim=(0.9 * seconds[0], 1.1 * seconds[-1]))
    panel.set(xscale="log", yscale="log")
    panel.set_xticks(seconds, [f"{value:g}" for value in seconds])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()


def by_family(runs: list[Run], stage: str) -> dict[str, list[Run]]:
    return {family: own for family in dict.fromkeys(run.family for run in runs)
            if (own := [run for run in runs if (run.family, run.stage) == (family, stage)])}


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3g}" if values else "failed"
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.2g}"


def table_head(*cells: str) -> list[str]:
    return [row(*cells), row(*["---"] * len(cells))]


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
