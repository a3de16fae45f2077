"""What compare.py compares: tasks and networks, the runs that the results so far call for, the table and the figure."""

import json
import math
import statistics
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.candidates import PARTS
from runtime import UserError
from runtime.files import write_text

LRS = (1.5e-3, 3e-3, 6e-3)
SEEDS = (0, 1, 2)
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
    follows: dict[str, str] = {}  # a family of one network -> one before it, whose rate it takes, without search and curve
    trials: dict[str, tuple[float, ...]] = {}  # a family, each of whose networks gets the whole budget -> rates to search
    finalists: tuple[str, ...] = ()  # of the trials' networks: they get all seeds and the curve
    judge: str | None = None              # the task whose classifier measures, if not its own
    seeds: tuple[int, ...] = SEEDS
    search: Fraction = Fraction(1, 5)     # of the budget, for each learning rate
    curve: tuple[Fraction, ...] = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2))  # shares that the first seed runs, too


TASKS = {
    "cifar": Task(1980, 128, (8, 8, 8), "--data-path {cifar_features}", ("{cifar}/test", "{cifar}/train"),
                  "--data-path {cifar}/train --image-size 32 --epochs 10", {
        "DiT": {"DiT/1 96x3": ("DiT-S/2", dict(patch_size=1, hidden_size=96, depth=3, num_heads=3)),
                "DiT/2 192x5": ("DiT-S/2", dict(hidden_size=192, depth=5, num_heads=3)),
                "DiT/2 256x3": ("DiT-S/2", dict(hidden_size=256, depth=3, num_heads=4))},
        "DiNext": {"DiNext/1 104x4": ("DiNext-S/2", dict(patch_size=1, hidden_size=104, depth=4, label_std=0.02)),
                   "DiNext/1 128x3": ("DiNext-S/2", dict(patch_size=1, hidden_size=128, depth=3, label_std=0.02)),
                   "DiNext/2 256x4": ("DiNext-S/2", dict(hidden_size=256, depth=4, label_std=0.02))},
        "DiNext-U": {"DiNext-U 64": ("DiNext-U-S", dict(hidden_size=64, depths=[1, 2, 3, 2, 1], label_std=0.02)),
                     "DiNext-U 64 21112": ("DiNext-U-S", dict(hidden_size=64, depths=[2, 1, 1, 1, 2], label_std=0.02)),
                     "DiNext-U 48 32223": ("DiNext-U-S", dict(hidden_size=48, depths=[3, 2, 2, 2, 3], label_std=0.02))},
        "ConvAdaLN": {"ConvAdaLN 96x4": ("ConvAdaLN", dict(hidden_size=96, depth=4))},
        "DiNextV2": {"DiNextV2/1 128x3": ("DiNextV2-S/2", dict(patch_size=1, hidden_size=128, depth=3))},
        "DiT labels": {"DiT/1 96x3 labels": (
            "DiT-S/2", dict(patch_size=1, hidden_size=96, depth=3, num_heads=3, label_std=1.0))},
        "DiT larger": {"DiT/1 128x4": ("DiT-S/2", dict(patch_size=1, hidden_size=128, depth=4, num_heads=4)),
                       "DiT/1 160x4": ("DiT-S/2", dict(patch_size=1, hidden_size=160, depth=4, num_heads=5))},
        "DiNextV2 larger": {f"DiNextV2/1 {width}x{depth}": ("DiNextV2-S/2", dict(patch_size=1, hidden_size=width, depth=depth))
                            for width, depth in ((160, 4), (192, 3))},
        "ConvAdaLN in parts": {f"ConvAdaLN-{part} 96x4": (f"ConvAdaLN-{part}", dict(hidden_size=96, depth=4))
                               for part in PARTS},
        "Dense": {"Dense 96x6": ("Dense", dict(hidden_size=96, depth=6))},
        "Silu": {"Silu 96x4": ("Silu", dict(hidden_size=96, depth=4))},
        "Hybrid": {"Hybrid 96x3": ("Hybrid", dict(hidden_size=96, depth=3))},
        "DiNextV3": {
            "DiNextV3/1 96x4": ("DiNextV3-S/2", dict(patch_size=1, hidden_size=96, depth=4, num_heads=3)),
            "DiNextV3/1 96x3": ("DiNextV3-S/2", dict(patch_size=1, hidden_size=96, depth=3, num_heads=3, attention_every=1)),
            "DiNextV3/1 128x3": ("DiNextV3-S/2", dict(patch_size=1, hidden_size=128, depth=3, num_heads=4, attention_every=1)),
        }},
        {"DiT labels": "DiT"},
        {"Silu": (3e-3,), "Hybrid": (3e-3,), "DiNextV3": LRS, "DiNextV2": (12e-3,), "ConvAdaLN in parts": (3e-3,), "Dense": LRS,
         "DiNextV2 larger": (3e-3, 6e-3, 12e-3), "DiT larger": (3e-3, 6e-3, 12e-3)},
        ("DiNextV2/1 128x3", "DiNextV3/1 96x4")),
    "cifar16": Task(3600, 128, (4, 16, 16), "--data-path {cifar16_features}", ("{cifar}/test", "{cifar}/train"), "", {
        "DiT": {"DiT/2 128x5": ("DiT-S/2", dict(hidden_size=128, depth=5, num_heads=4))},
        "DiNext-U": {"DiNext-U 40": ("DiNext-U-S", dict(hidden_size=40, depths=[1, 2, 3, 2, 1], label_std=1.0))},
        "ConvAdaLN": {"ConvAdaLN 64x4": ("ConvAdaLN", dict(hidden_size=64, depth=4))},
        "DiNextV3": {"DiNextV3/1 64x3": ("DiNextV3-S/2", dict(patch_size=1, hidden_size=64, depth=3, num_heads=2)),
                     "DiNextV3/2 128x3": ("DiNextV3-S/2", dict(hidden_size=128, depth=3, num_heads=4))}},
        judge="cifar", seeds=(0, 1), search=Fraction(1, 10), curve=()),
    "mnist16": Task(420, 64, (1, 16, 16), "--data-path mnist --image-size 16 --vae pixels", ("mnist", "mnist"),
                    "--data-path mnist --image-size 16 --epochs 5", {
        "DiT": {"DiT/2 96x4": ("DiT-S/2", dict(hidden_size=96, depth=4, num_heads=3)),
                "DiT/4 192x5": ("DiT-S/4", dict(hidden_size=192, depth=5, num_heads=3))},
        "DiNext": {"DiNext/2 96x5": ("DiNext-S/2", dict(hidden_size=96, depth=5, label_std=0.02))},
        "DiNext-U": {"DiNext-U 32": ("DiNext-U-S", dict(hidden_size=32, depths=[1, 1, 2, 1, 1], label_std=0.02))}}),
    "digits": Task(60, 64, (1, 8, 8), "--data-path digits --vae pixels", ("digits", "digits"),
                   "--data-path digits --epochs 20", {
        "DiT": {"DiT/1 40x2": ("DiT-S/2", dict(patch_size=1, hidden_size=40, depth=2, num_heads=1)),
                "DiT/2 64x4": ("DiT-S/2", dict(hidden_size=64, depth=4, num_heads=2))},
        "DiNext": {"DiNext/2 64x4": ("DiNext-S/2", dict(hidden_size=64, depth=4, label_std=0.02))},
        "DiNext-U": {"DiNext-U 16": ("DiNext-U-S", dict(hidden_size=16, depths=[1, 1, 1, 1, 1], label_std=0.02))}}),
}


# --- which runs --------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One training, its samples and figures."""

    task: str
    stage: str  # "search" of a learning rate and shape, "trial", "main", "curve"
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

    @property
    def seconds(self) -> float:
        """Of training."""
        return TASKS[self.task].seconds * float(self.share)


def plan(task: str, results: dict[str, dict]) -> list[Run]:
    """The runs of a task in their order, as far as the results so far determine them."""
    runs, best = [], {}
    for family, networks in TASKS[task].families.items():
        if family in TASKS[task].trials:
            continue
        if leader := TASKS[task].follows.get(family):
            best[family] = best[leader] and best[leader]._replace(family=family, network=next(iter(networks)))
        else:
            searched, best[family] = search(task, family, list(networks), results)
            runs += searched
    if None in best.values():
        return runs
    curves = [run for family, run in best.items() if family not in TASKS[task].follows]
    return runs + whole(task, list(best.values()), curves) + trials(task, results)


def whole(task: str, chosen: list[Run], curves: list[Run]) -> list[Run]:
    """The runs of the chosen networks with the whole budget, and the curve of some."""
    seeds, curve = TASKS[task].seeds, TASKS[task].curve
    return [*(run._replace(stage="main", seed=seed, share=Fraction(1)) for seed in seeds for run in chosen),
            *(run._replace(stage="curve", seed=seeds[0], share=share) for share in curve for run in curves)]


def trials(task: str, results: dict[str, dict]) -> list[Run]:
    """The runs on trial: each network gets the whole budget once, finalists get what the chosen get.

    The rate is searched with a family's first network; a single one is taken as it is.
    """
    runs, finalists = [], []
    for family, rates in TASKS[task].trials.items():
        networks, lr = list(TASKS[task].families[family]), rates[0]
        if len(rates) > 1:
            searched, best = search_rate(task, family, networks[0], results, rates)
            runs += searched
            lr = best and best.lr
        for network in networks if lr else []:
            run = Run(task, "trial", family, network, lr, TASKS[task].seeds[0], Fraction(1))
            (finalists if network in TASKS[task].finalists else runs).append(run)
    return whole(task, finalists, finalists) + runs


def search(task: str, family: str, networks: list[str], results: dict[str, dict]) -> tuple[list[Run], Run | None]:
    """The runs that search a family's network and learning rate, and the best of them once all are done."""
    searches = [search_rate(task, family, network, results) for network in networks]
    candidates = [best for _, best in searches]
    runs = [run for searched, _ in searches for run in searched]
    return runs, None if None in candidates else min(candidates, key=lambda run: distance(results[run.name]))


def search_rate(task: str, family: str, network: str, results: dict[str, dict],
                rates: tuple[float, ...] = LRS) -> tuple[list[Run], Run | None]:
    """The runs that search a network's learning rate, and the best of them once it is inside the range."""
    rates, seed, share = list(rates), TASKS[task].seeds[0], TASKS[task].search
    while True:
        runs = [Run(task, "search", family, network, lr, seed, share) for lr in rates]
        if not all(run.name in results for run in runs):
            return runs, None
        best = min(runs, key=lambda run: distance(results[run.name]))
        if min(rates) < best.lr < max(rates):
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
    return round(run.seconds / times[run.network]["seconds"])


def missing_runs(task: str, folder: Path) -> list[Run]:
    results = read_results(folder)
    return [run for run in plan(task, results) if run.name not in results]


# --- report ------------------------------------------------------------------------------------------


def write_report(folder: Path, tasks: list[str]) -> None:
    """Write table.md and compare.png of the tasks that have results."""
    from matplotlib.figure import Figure  # from the extra `notebooks`

    results, lines = read_results(folder), []
    runs = {task: done for task in tasks if (done := [run for run in plan(task, results) if run.name in results])}
    if not runs:
        raise UserError(f"`results` {folder} has no result of {' or '.join(tasks)}")
    picture = Figure(figsize=(5 * len(runs), 4), layout="tight")
    panels = picture.subplots(1, len(runs), squeeze=False)[0]
    for (task, done), panel in zip(runs.items(), panels):
        lines += [f"## {task}", "", *main_table(task, done, results), "", *search_table(done, results), ""]
        draw_curves(panel, task, done, results)
    write_text(folder / "table.md", "\n".join(lines))
    picture.savefig(folder / "compare.png", dpi=120)


def main_table(task: str, done: list[Run], results: dict[str, dict]) -> list[str]:
    """A row a network: its costs and figures, mean and standard deviation over the seeds; then the floors."""
    rows, floors = [], dict.fromkeys(FIGURES, "-")
    for runs in by_network(done, "trial", "main"):
        reports = [results[run.name] for run in runs]
        measured = [report for report in reports if "figures" in report]
        costs = results[f"{task}-times"]["networks"][runs[0].network]
        floors |= {name: f"{figure(report, name)['floor']:.3g}" for report in measured for name in FIGURES}
        guided = [f"{figure(report, FIGURES[0], 'guided')['value']:.3g}" for report in measured if "guided" in report]
        rows.append([runs[0].network, f"{costs['parameters'] / 1e6:.2f}", f"{costs['macs'] / 1e6:.1f}",
                     f"{costs['seconds'] * 1e3:.0f}", reports[0]["steps"], f"{reports[0]['steps'] * costs['macs'] / 1e9:.0f}",
                     f"{runs[0].lr:g}", f"{len(measured)} of {len(runs)}" if len(measured) < len(runs) else len(runs),
                     *(spread([figure(report, name)["value"] for report in measured]) for name in FIGURES),
                     *(guided or ["-"])])
    if decoded := results.get(f"{task}-reconstructions"):
        values = [f"{figure(decoded, name)['value']:.3g}" for name in FIGURES]
        rows.append(["real images, encoded and decoded", *7 * ["-"], *values, "-"])
    return table(["network", "M parameters", "MMAC", "ms a step", "steps", "steps x GMAC", "lr", "seeds", *FIGURES,
                  f"guided {GUIDANCE}"], [*rows, ["real images", *7 * ["-"], *floors.values(), "-"]])


def search_table(done: list[Run], results: dict[str, dict]) -> list[str]:
    """FD-classifier after a share of the steps, by network and learning rate."""
    found = {(run.network, run.lr): f"{distance(results[run.name]):.3g}" for run in done if run.stage == "search"}
    rates = sorted({lr for _, lr in found})
    networks = dict.fromkeys(network for network, _ in found)
    share = next((run.share for run in done if run.stage == "search"), "")
    return table([f"{share} of the steps, lr", *(f"{lr:g}" for lr in rates)],
                 [[network, *(found.get((network, lr), "-") for lr in rates)] for network in networks])


def table(head: list, rows: list[list]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows)]


def draw_curves(panel, task: str, done: list[Run], results: dict[str, dict]) -> None:
    """FD-classifier over the seconds of training; bars are standard deviations over the seeds. Floors may be out of sight."""
    from matplotlib.ticker import LogLocator

    drawn, floors = [], {}
    for runs in by_network(done, "main", "curve"):
        points = {}  # seconds -> distances
        for run in [run for run in runs if "figures" in results[run.name]]:
            if run.stage == "main":  # that of training images; the curve's is between halves of the held-out ones
                floors["real images"] = figure(results[run.name], FIGURES[0])["floor"]
            points.setdefault(run.seconds, []).append(distance(results[run.name]))
        if not points:
            continue
        seconds, values = zip(*sorted(points.items()))
        panel.errorbar(seconds, list(map(statistics.mean, values)), [statistics.stdev(v) if len(v) > 1 else 0 for v in values],
                       marker="o", capsize=4, label=runs[0].network)
        drawn += [value for point in values for value in point if value > 0]
    if decoded := results.get(f"{task}-reconstructions"):
        floors["encoded, decoded"] = distance(decoded)
    for (title, floor), style in zip(floors.items(), (":", "--")):
        panel.axhline(floor, color="gray", linewidth=1, linestyle=style, label=f"{title}: {floor:.2g}")
    panel.set(title=task, xlabel="seconds of training, one CPU core", ylabel=FIGURES[0])
    if drawn:
        seconds = [float(share) * TASKS[task].seconds for share in (*TASKS[task].curve, 1)]
        # Limits come before the scales: matplotlib may divide by 0 for those of a single point.
        panel.set(ylim=(min(drawn) / 1.3, max(drawn) * 1.8), xlim=(0.9 * seconds[0], 1.1 * seconds[-1]))
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(seconds, [f"{value:g}" for value in seconds])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.legend(fontsize="x-small", loc="upper right")


def by_network(runs: list[Run], *stages: str) -> list[list[Run]]:
    """The runs of some stages, those of a network together."""
    networks = {}
    for run in runs:
        if run.stage in stages:
            networks.setdefault(run.network, []).append(run)
    return list(networks.values())


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3g}" if values else "failed"
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.2g}"
