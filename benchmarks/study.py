"""Compare ways to train and to sample at equal time of one CPU core: studies of several stages, seeds and samplers.

    python benchmarks/study.py time flow-map     # once, on a quiet machine: a training step of each stage
    taskset -c 0 python benchmarks/study.py run flow-map    # the missing runs; a second process beside it takes others
    python benchmarks/study.py table flow-map    # table.md, from the results

- flow-map: a flow; a map from it, for as long again; a flow of twice the time. Few calls of the network.
- heads: a network alone, with internal guidance, aligned to a classifier's features; autoguidance by an early checkpoint.
- labels: the label embeddings of the DiNext family begin with deviation 0.02 or 1.

Each stage of each seed is trained, draws images by several samplers, and is measured by evaluate.py, as compare.py's tasks are.
`run` may be killed at any moment; the same command continues. Each run writes one JSON to --results. How to get the data of
`cifar` is told in docs/comparison.md. Classifiers are compare.py's; one that is not there is trained into --results.
"""

import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import compare
from benchmarks.compare import FLOW, about, call, claim, expand
from benchmarks.comparison import SEEDS, TASKS, figure, read_results, spread, table
from diffusion.flow_map import FlowMap
from diffusion.guidance import in_interval
from diffusion.samplers import evaluation_times, get_sampler
from runtime import UserError, cli
from runtime.files import check_writable, write_json, write_text

ROUNDS, TIMED = 3, 40  # of the times: rounds of runs of so many steps
OMEGA = 0.6               # of guidance in a map's training
SCALE = 1 / (1 - OMEGA)   # of the same guidance at sampling: u = v + OMEGA (u - u_null) is v_null + SCALE (v - v_null)
UP_TO = 700               # the timesteps with it
OPTIMIZER = {"betas": [0.9, 0.95], "schedule": "cosine"}
FIGURES = ("FD-classifier", "FD-pixel32", "Label accuracy")
QUARTER = 4               # an early checkpoint guides: that of a quarter of the steps


class Sampler(NamedTuple):
    """A way to draw."""

    name: str
    steps: int
    scale: float = 1.0
    up_to: int = 1000       # timesteps with guidance
    auto: bool = False      # guided by an early checkpoint of the run
    internal: float = 1.0   # the scale of internal guidance

    @property
    def title(self) -> str:
        kind = "autoguidance" if self.auto else "guidance"
        guided = f", {kind} {self.scale:g}" if self.scale != 1 else ""
        return f"{self.name} {self.steps}{guided}{f', internal {self.internal:g}' if self.internal != 1 else ''}"

    def flags(self, folder: Path, steps: int) -> list[str]:
        """Of sample_ddp.py, for a run of so many steps."""
        guide = ["--guide-ckpt", str(folder / f"checkpoints/{max(1, steps // QUARTER):07d}.pt")] if self.auto else []
        interval = ["--guidance-interval", "0", str(self.up_to)] if self.up_to < 1000 else []
        internal = ["--internal-scale", f"{self.internal:g}"] if self.internal != 1 else []
        return ["--sampler", self.name, "--num-sampling-steps", str(self.steps), "--cfg-scale", f"{self.scale:g}", *interval,
                *guide, *internal]

    @property
    def calls(self) -> int:
        """How often an image goes through a network."""
        process = FlowMap(self.steps)
        times = evaluation_times(get_sampler(self.name, process), process)
        return len(times) + sum(in_interval(times, self.scale, (0, self.up_to)))


class Stage(NamedTuple):
    """A training, and how it is sampled."""

    samplers: list[Sampler]
    diffusion: dict[str, Any] = FLOW
    heads: dict[str, Any] | None = None  # of train.py; CLASSIFIER stands for compare.py's
    time: int = 1                        # times the seconds
    begins: str | None = None            # the stage of the same seed from whose weights it begins
    changes: dict[str, Any] = {}         # of the network's arguments, which do not change the time of a step


class Study(NamedTuple):
    """What is trained on a task of compare.py."""

    task: str
    network: str                # of the task's
    seconds: float              # of a stage
    lr: float
    samples: int                # of each sampler
    stages: dict[str, Stage]
    changes: dict[str, Any] = {}
    pictures: str | None = None  # flags of train.py for stages that align, if the task has latents
    seeds: tuple[int, ...] = SEEDS
    judge: str | None = None    # flags of classifier.py over the task's, for a classifier of the study's own


EULER, MAP = ([Sampler(name, steps) for steps in (1, 2, 4, 8)] for name in ("euler", "map"))
HEUN = [Sampler("heun", steps) for steps in (2, 4, 25)]
MAPS = {"flow": Stage([*EULER, HEUN[-1]]),
        "longer flow": Stage([*EULER, *HEUN, Sampler("heun", 25, SCALE, UP_TO)], time=2),
        "map": Stage(MAP, {"objective": "flow-map"}, begins="flow"),
        "guided map": Stage(MAP, {"objective": "flow-map", "map_guidance": OMEGA}, begins="flow")}
PLAIN = Sampler("euler", 25)
ALIGNED = {"align": {"encoder": "classifier:CLASSIFIER", "hidden_size": 128}}
HEADS = {"plain": Stage([PLAIN, *(PLAIN._replace(scale=scale, auto=True) for scale in (1.5, 2))]),
         "internal": Stage([PLAIN, *(PLAIN._replace(internal=scale) for scale in (1.4, 2, 3, 4))], heads={"internal": {}}),
         "align": Stage([PLAIN], heads=ALIGNED)}
LABELS = {f"deviation {std}": Stage([PLAIN], changes={"label_std": std}) for std in (0.02, 1.0)}
JUDGE = "--seed 1 --width 48"
PICTURES = "--data-path {cifar}/train --image-size 32 --vae {compared}/cifar-autoencoder"
TEN = {"time_scale": 0.01}  # t on 0..10
STUDIES = {
    "flow-map": {"digits": Study("digits", "DiNext-U 16", 60, 5e-3, 5000, MAPS, TEN),
                 "mnist16": Study("mnist16", "DiNext-U 32", 240, 3e-3, 2000, MAPS, TEN),
                 "cifar": Study("cifar", "DiT/1 96x3", 480, 6e-3, 2000, MAPS, TEN)},
    "heads": {"mnist16-dit": Study("mnist16", "DiT/4 192x5", 240, 6e-3, 2000, HEADS, judge=JUDGE),
              "mnist16-dinext-u": Study("mnist16", "DiNext-U 32", 240, 6e-3, 2000, HEADS, judge=JUDGE),
              "cifar-dit": Study("cifar", "DiT/1 96x3", 420, 12e-3, 2000, HEADS, pictures=PICTURES, judge=JUDGE),
              "cifar-dinextv2": Study("cifar", "DiNextV2/1 128x3", 420, 12e-3, 2000, HEADS, pictures=PICTURES, judge=JUDGE)},
    "labels": {"mnist16-dinext": Study("mnist16", "DiNext/2 96x5", 240, 12e-3, 2000, LABELS, seeds=SEEDS[:2]),
               "mnist16-dinext-u": Study("mnist16", "DiNext-U 32", 240, 6e-3, 2000, LABELS, seeds=SEEDS[:2]),
               "cifar-dinext": Study("cifar", "DiNext/1 128x3", 660, 12e-3, 2000, LABELS, seeds=SEEDS[:2]),
               "cifar-dinext-u": Study("cifar", "DiNext-U 48 32223", 660, 6e-3, 2000, LABELS, seeds=SEEDS[:2])}}


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Compare ways to train and to sample at equal time.")
    parser.add_argument("what", choices=list(ACTIONS), help="time first, then run; table at any time")
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--parts", type=list[str] | None, help="of the study, in this order; default: all")
    parser.add_argument("--results", type=str | None, help="folder of JSON and table; default: benchmarks/results/STUDY")
    parser.add_argument("--compared", default="benchmarks/results/compare", help="compare.py's results: classifiers and floors")
    parser.add_argument("--work", default="results/study", help="folder of runs and samples")
    compare.add_task_arguments(parser)
    return parser


# --- runs ------------------------------------------------------------------------------------------


def name_of(part: str, stage: str, seed: int) -> str:
    return f"{part}-{stage.replace(' ', '-')}-seed{seed}"


def plan(args: Namespace) -> Iterator[tuple[str, str, int]]:
    for part in args.parts or STUDIES[args.study]:
        if part not in STUDIES[args.study]:
            raise UserError(f"`parts` {part!r} is unknown; allowed: {', '.join(STUDIES[args.study])}")
        yield from ((part, stage, seed) for seed in STUDIES[args.study][part].seeds
                    for stage in STUDIES[args.study][part].stages)


def train_flags(part: str, stage: str, seed: int, steps: int, args: Namespace) -> list[str]:
    """The command of a run, without the folder that it lies in."""
    study = STUDIES[args.study][part]
    task, what = TASKS[study.task], study.stages[stage]
    preset, changes = next(family[study.network] for family in task.families.values() if study.network in family)
    heads = json.dumps(what.heads or {}).replace("CLASSIFIER", str(Path(args.compared) / f"classifier-{study.task}.pt"))
    data = study.pictures if study.pictures and "align" in (what.heads or {}) else task.data
    return ["train.py", *expand(data, args), "--data-root", args.data_root, "--model", preset,
            "--model-args", json.dumps(changes | study.changes | what.changes), "--diffusion-args", json.dumps(what.diffusion),
            "--heads", heads, "--optimizer-args", json.dumps(OPTIMIZER | {"warmup_steps": steps // 20}), "--lr", str(study.lr),
            "--ema-decay", "0.99", "--max-steps", str(steps), "--global-batch-size", str(task.batch_size),
            "--global-seed", str(seed), "--num-workers", "0", "--preview-every", "0"]


def time_stages(args: Namespace) -> None:
    """Write PART-times.json: the seconds of a training step of each stage, by runs of train.py, all in turn.

    They are those of the fastest round: another load on the machine can only add.
    """
    check_writable(args.results)
    for part in dict.fromkeys(part for part, *_ in plan(args)):
        if (path := Path(args.results) / f"{part}-times.json").exists():
            raise UserError(f"{path} exists, and budgets depend on it; delete it to measure again")
        stages, seconds = STUDIES[args.study][part].stages, {}
        for run in range(ROUNDS):
            for stage in [stage for stage in stages if timed_as(stages, stage) == stage]:
                name = f"time-{name_of(part, stage, run)}"
                call([*train_flags(part, stage, 0, TIMED, args), "--log-every", str(TIMED // 2), "--results-dir", args.work,
                      "--run-name", name])
                last = json.loads((Path(args.work) / name / "metrics.jsonl").read_text().splitlines()[-1])
                batch = TASKS[STUDIES[args.study][part].task].batch_size
                seconds[stage] = min(seconds.get(stage, math.inf), batch / last["images_per_second"])
        write_json(path, {**about(), "rounds": ROUNDS, "seconds": seconds})


def timed_as(stages: dict[str, Stage], stage: str) -> str:
    """The first stage whose steps are the same."""
    return next(name for name in stages if (stages[name].diffusion, stages[name].heads) == (
        stages[stage].diffusion, stages[stage].heads))


def steps_of(part: str, stage: str, args: Namespace) -> int:
    """The seconds of a stage over the seconds of its step."""
    times, study = read_results(Path(args.results)).get(f"{part}-times"), STUDIES[args.study][part]
    if times is None:
        raise UserError(f"the step times of {part} are not known; first run `study.py time {args.study} --parts [{part}]`")
    return round(study.stages[stage].time * study.seconds / times["seconds"][timed_as(study.stages, stage)])


def run_all(args: Namespace) -> None:
    """Do the missing runs. Several processes may share the work; what needs the run or classifier of another comes later."""
    results, claims = Path(args.results), Path(args.work) / "claims"
    for folder in (args.work, args.results):
        check_writable(folder)
    for part, stage, _ in plan(args):
        steps_of(part, stage, args)
    for part in dict.fromkeys(part for part, *_ in plan(args)):
        study, classifier = STUDIES[args.study][part], classifier_of(part, args)
        flags = f"{TASKS[study.task].classifier} {study.judge or ''}"
        compare.train_classifier(classifier, flags, claims / classifier.stem, args)
    left = None
    while left != (left := [run for run in plan(args) if not (results / f"{name_of(*run)}.json").exists()]):
        for part, stage, seed in left:
            out, first = results / f"{name_of(part, stage, seed)}.json", STUDIES[args.study][part].stages[stage].begins
            ready = classifier_of(part, args).exists() and (
                first is None or (results / f"{name_of(part, first, seed)}.json").exists())
            if ready and claim(claims / out.stem) and not out.exists():
                write_json(out, execute(part, stage, seed, args))


def classifier_of(part: str, args: Namespace) -> Path:
    """What judges a part: compare.py's, or one of the study's own."""
    study = STUDIES[args.study][part]
    name = f"classifier-{study.task}{'-judge' if study.judge else ''}.pt"
    theirs = Path(args.compared) / name
    return theirs if theirs.exists() else Path(args.results) / name


def execute(part: str, stage: str, seed: int, args: Namespace) -> dict[str, Any]:
    """Train, sample and measure. Returns what the run's JSON holds."""
    study, name, steps = STUDIES[args.study][part], name_of(part, stage, seed), steps_of(part, stage, args)
    what, folder = study.stages[stage], Path(args.work) / name
    train = [*train_flags(part, stage, seed, steps, args), "--ckpt-every", str(max(1, steps // QUARTER)), "--results-dir",
             args.work, "--run-name", name]
    if what.begins:
        train += ["--init-from", str(Path(args.work) / name_of(part, what.begins, seed))]
    call(train)
    figures = {sampler.title: measure(part, folder, sampler, steps, args) for sampler in what.samplers}
    return {"part": part, "seed": seed, "stage": stage, "seconds": study.seconds * what.time, "steps": steps, **about(),
            "command": shlex.join(train), "figures": figures}


def measure(part: str, folder: Path, sampler: Sampler, steps: int, args: Namespace) -> list[dict[str, Any]]:
    """evaluate.py's figures of a run's samples."""
    study, samples = STUDIES[args.study][part], folder / sampler.title.replace(" ", "-")
    call(["sample_ddp.py", "--ckpt", str(folder), "--balanced", "--num-fid-samples", str(study.samples),
          "--per-proc-batch-size", "250", "--sample-dir", str(samples), *sampler.flags(folder, steps)])
    (npz,) = samples.glob("*.npz")
    held_out, training = expand(" ".join(TASKS[study.task].real), args)
    first = sampler == next(iter(study.stages.values())).samplers[0]  # its floor is of as many real images
    call(["evaluate.py", held_out, str(npz), "--weights", "none", "--classifier", str(classifier_of(part, args)),
          "--data-root", args.data_root, "--json", str(samples / "figures.json"),
          *(["--training-images", training] if first else [])])
    return json.loads((samples / "figures.json").read_text())["figures"]


# --- report ----------------------------------------------------------------------------------------


def write_table(args: Namespace) -> None:
    """Write table.md: a row a sampler of a stage, mean and standard deviation over the seeds, and the means above the floor."""
    results, lines = read_results(Path(args.results)), []
    for part in dict.fromkeys(part for part, *_ in plan(args)):
        reports = [report for report in results.values() if report.get("part") == part]
        if not reports:
            continue
        floor = floors_of(part, reports, args)
        rows = [[stage, title, calls, len(seeds), *map(spread, zip(*seeds)),
                 *(f"{statistics.mean(column) - floor[i]:.3g}" for i, column in enumerate(list(zip(*seeds))[:2]))]
                for stage, what in STUDIES[args.study][part].stages.items()
                for title, calls, seeds in ways_of(what, [report for report in reports if report["stage"] == stage])]
        lines += [f"## {part}", "", *table(
            ["network", "sampler", "calls", "seeds", *FIGURES, *(f"{name}, above the floor" for name in FIGURES[:2])],
            [*rows, ["real images", *3 * ["-"], *(f"{value:.3g}" for value in floor), "0", "0"]]), ""]
    if not lines:
        raise UserError(f"`results` {args.results} has no results of {args.study}")
    write_text(Path(args.results) / "table.md", "\n".join(lines))
    print(f"Wrote {args.results}/table.md")


def ways_of(what: Stage, reports: list[dict]) -> Iterator[tuple[str, int, list[list[float]]]]:
    """Title and calls of each sampler of a stage, and its FIGURES for each seed; at the end, those of the best scale.

    The best scale for a seed is that of the next seed, so that no seed chooses its own.
    """
    if not reports:
        return
    found = {sampler: [[figure({"figures": report["figures"][sampler.title]}, name)["value"] for name in FIGURES]
                       for report in reports] for sampler in what.samplers}
    yield from ((sampler.title, sampler.calls, seeds) for sampler, seeds in found.items())
    scales = [sampler for sampler in what.samplers if sampler.auto or sampler.internal != 1]
    if len(scales) > 1 and len(reports) > 1:
        best = [min(scales, key=lambda sampler: found[sampler][(i + 1) % len(reports)][0]) for i in range(len(reports))]
        yield "the best scale of the next seed", scales[0].calls, [found[sampler][i] for i, sampler in enumerate(best)]


def floors_of(part: str, reports: list[dict], args: Namespace) -> list[float]:
    """FIGURES of as many real images; for latents judged by compare.py's classifier, its ones of images encoded and decoded."""
    study = STUDIES[args.study][part]
    decoded = read_results(Path(args.compared)).get(f"{study.task}-reconstructions")
    if decoded and not study.judge:
        return [figure(decoded, name)["value"] for name in FIGURES]
    stage, what = next(iter(study.stages.items()))
    first = next(report["figures"][what.samplers[0].title] for report in reports if report["stage"] == stage)
    return [figure({"figures": first}, name)["floor"] for name in FIGURES]


ACTIONS = {"time": time_stages, "run": run_all, "table": write_table}


def main(args: Namespace) -> None:
    args.results = args.results or f"benchmarks/results/{args.study}"
    ACTIONS[args.what](args)


if __name__ == "__main__":
    cli.run(main, build_parser())
