"""How near to real images is a flow map in 1, 2, 4 and 8 calls, beside a flow that was trained for as long?

    python benchmarks/few_steps.py time     # once, on a quiet machine: a training step of each objective
    taskset -c 0 python benchmarks/few_steps.py run     # the missing runs; a second process beside it takes others
    python benchmarks/few_steps.py table    # table.md, from the results

For each task of compare.py and each seed: a flow is trained; a map from it, for as long again; and a flow of twice the time.
Each draws images by several samplers, and evaluate.py measures them. `run` may be killed at any moment; the same command
continues. Each run writes one JSON to --results. How to get the data of `cifar`, is told in docs/comparison.md. Classifiers are
compare.py's; one that is not there is trained into --results.
"""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.compare import about, build, call, claim, expand, training_step
from benchmarks.comparison import SEEDS, TASKS, figure, read_results, spread, table
from benchmarks.instruments import time_in_turn
from diffusion.flow_map import FlowMap
from diffusion.guidance import in_interval
from diffusion.samplers import evaluation_times, get_sampler
from runtime import UserError, cli
from runtime.files import check_writable, write_json, write_text
from runtime.processes import start_world

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 30  # of timed steps
OMEGA = 0.6               # of guidance in training
SCALE = 1 / (1 - OMEGA)   # of the same guidance at sampling: u = v + OMEGA (u - u_null) is v_null + SCALE (v - v_null)
INTERVAL = (0, 700)       # timesteps with guidance
FLOW = {"objective": "flow", "time_sampling": "logit-normal"}
OBJECTIVES = {"flow": FLOW, "map": {"objective": "flow-map"}, "guided map": {"objective": "flow-map", "map_guidance": OMEGA}}
FIGURES = ("FD-classifier", "FD-pixel32", "Label accuracy")


class Sampler(NamedTuple):
    """A way to draw."""

    name: str
    steps: int
    guided: bool = False  # as a map that was trained with OMEGA is: at timesteps up to 700, with the same scale

    @property
    def title(self) -> str:
        return f"{self.name} {self.steps}{f', guidance {SCALE:g}' if self.guided else ''}"

    @property
    def flags(self) -> list[str]:
        """Of sample_ddp.py."""
        guidance = [f"{SCALE:g}", "--guidance-interval", *map(str, INTERVAL)] if self.guided else ["1"]
        return ["--sampler", self.name, "--num-sampling-steps", str(self.steps), "--cfg-scale", *guidance]

    @property
    def calls(self) -> int:
        """How often an image goes through the network."""
        process = FlowMap(self.steps)
        times = evaluation_times(get_sampler(self.name, process), process)
        return len(times) + sum(in_interval(times, SCALE, INTERVAL) if self.guided else ())


EULER, MAP = ([Sampler(name, steps) for steps in (1, 2, 4, 8)] for name in ("euler", "map"))
HEUN = [Sampler("heun", steps) for steps in (2, 4, 25)]
STAGES = {"flow": [*EULER, HEUN[-1]], "longer flow": [*EULER, *HEUN, Sampler("heun", 25, True)], "map": MAP, "guided map": MAP}


class Study(NamedTuple):
    """What is trained on a task of compare.py."""

    family: str
    network: str
    seconds: float  # of training a flow, and of training its map
    lr: float
    samples: int    # of each sampler


STUDIES = {"digits": Study("DiNext-U", "DiNext-U 16", 60, 5e-3, 5000),
           "mnist16": Study("DiNext-U", "DiNext-U 32", 240, 3e-3, 2000),
           "cifar": Study("DiT", "DiT/1 96x3", 480, 6e-3, 2000)}


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Compare flow maps with flows that were trained for as long.")
    parser.add_argument("what", choices=list(ACTIONS), help="time first, then run; table at any time")
    parser.add_argument("--tasks", nargs="+", default=list(STUDIES), choices=list(STUDIES), help="in this order")
    parser.add_argument("--results", default="benchmarks/results/flow-map", help="folder of JSON, and of the table")
    parser.add_argument("--compared", default="benchmarks/results/compare", help="compare.py's results: classifiers and floors")
    parser.add_argument("--work", default="results/few-steps", help="folder of runs and samples")
    parser.add_argument("--data-root", default="data", help="where MNIST lies")
    parser.add_argument("--cifar", default="data/cifar10-jpg", help="CIFAR-10's pictures, with train and test")
    parser.add_argument("--cifar-features", default="features/cifar10/train", help="their latents, mirrored ones too")
    return parser


def network_of(task: str) -> tuple[str, dict[str, Any]]:
    """The preset and its changes. t is embedded on 0..10."""
    preset, changes = TASKS[task].families[STUDIES[task].family][STUDIES[task].network]
    return preset, changes | {"time_scale": 1e-2}


def time_steps(args: Namespace) -> None:
    """Write TASK-times.json: the median seconds of a training step of each objective, all in turn, on one thread."""
    torch.set_num_threads(1)
    start_world("cpu")
    check_writable(args.results)
    for name in args.tasks:
        if (path := Path(args.results) / f"{name}-times.json").exists():
            raise UserError(f"{path} exists, and budgets depend on it; delete it to measure again")
        calls = {objective: training_step(build(network_of(name), TASKS[name].shape), TASKS[name], flags)
                 for objective, flags in OBJECTIVES.items()}
        seconds = time_in_turn(calls, ROUNDS, torch.device("cpu"), "rounds of steps")
        medians = {objective: statistics.median(all_rounds) for objective, all_rounds in seconds.items()}
        write_json(path, {**about(), "rounds": ROUNDS, "seconds": medians})


def steps_of(task: str, stage: str, results: dict[str, dict]) -> int:
    """Steps of the stage: the study's seconds over the seconds of a step; twice as many for the longer flow."""
    if f"{task}-times" not in results:
        raise UserError(f"the step times of {task} are not known; first run `few_steps.py time --tasks {task}`")
    seconds, longer = results[f"{task}-times"]["seconds"], stage == "longer flow"
    return round((2 if longer else 1) * STUDIES[task].seconds / seconds["flow" if longer else stage])


def run_all(args: Namespace) -> None:
    """Do the missing runs. Several processes may share the work; one that needs the flow of another takes other runs first."""
    results = Path(args.results)
    check_writable(args.work)
    check_writable(args.results)
    for task in args.tasks:
        steps_of(task, "flow", read_results(results))
        while not (classifier := classifier_of(task, args)).exists():
            if claim(Path(args.work) / "claims" / task):
                call(["benchmarks/classifier.py", *expand(TASKS[task].classifier, args), "--data-root", args.data_root,
                      "--out", str(classifier)])
            else:
                time.sleep(10)  # another process trains it
    left = None
    while left != (left := [run for run in plan(args.tasks) if not (results / name_of(*run)).exists()]):
        for task, seed, stage in left:
            flow = results / name_of(task, seed, "flow")
            ready = "map" not in stage or flow.exists()
            if ready and claim(Path(args.work) / "claims" / name_of(task, seed, stage)) and not (
                    results / name_of(task, seed, stage)).exists():
                write_json(results / name_of(task, seed, stage), execute(task, seed, stage, args))


def classifier_of(task: str, args: Namespace) -> Path:
    """compare.py's, which its results hold for some tasks; else one of our own."""
    name = f"classifier-{task}.pt"
    return path if (path := Path(args.compared) / name).exists() else Path(args.results) / name


def plan(tasks: list[str]) -> Iterator[tuple[str, int, str]]:
    yield from ((task, seed, stage) for task in tasks for seed in SEEDS for stage in STAGES)


def name_of(task: str, seed: int, stage: str) -> str:
    return f"{task}-{stage.replace(' ', '-')}-seed{seed}.json"


def execute(task: str, seed: int, stage: str, args: Namespace) -> dict[str, Any]:
    """Train, sample and measure. Returns what the run's JSON holds."""
    study, name = STUDIES[task], name_of(task, seed, stage).removesuffix(".json")
    folder, flow = Path(args.work) / name, Path(args.work) / name_of(task, seed, "flow").removesuffix(".json")
    steps, (preset, changes), is_map = steps_of(task, stage, read_results(Path(args.results))), network_of(task), "map" in stage
    train = ["train.py", *expand(TASKS[task].data, args), "--data-root", args.data_root, "--model", preset,
             "--model-args", json.dumps(changes), "--diffusion-args", json.dumps(OBJECTIVES.get(stage, FLOW)),
             "--optimizer-args", json.dumps({"betas": [0.9, 0.95], "warmup_steps": steps // 20, "schedule": "cosine"}),
             "--lr", str(study.lr), "--ema-decay", "0.99", "--max-steps", str(steps),
             "--global-batch-size", str(TASKS[task].batch_size), "--global-seed", str(seed), "--num-workers", "0",
             "--ckpt-every", "200", "--keep-last", "1", "--preview-every", "0", "--results-dir", args.work, "--run-name", name,
             *(["--init-from", str(flow)] if is_map else [])]
    call(train)
    figures = {sampler.title: measure(task, folder, sampler, args) for sampler in STAGES[stage]}
    return {"task": task, "seed": seed, "stage": stage, "seconds": study.seconds * (2 if stage == "longer flow" else 1),
            "steps": steps, **about(), "command": shlex.join(train), "figures": figures}


def measure(task: str, folder: Path, sampler: Sampler, args: Namespace) -> list[dict[str, Any]]:
    """evaluate.py's figures of a run's samples."""
    samples = folder / sampler.title.replace(" ", "-")
    call(["sample_ddp.py", "--ckpt", str(folder), "--balanced", "--num-fid-samples", str(STUDIES[task].samples),
          "--per-proc-batch-size", "250", "--sample-dir", str(samples), *sampler.flags])
    (npz,) = samples.glob("*.npz")
    held_out, training = expand(" ".join(TASKS[task].real), args)
    call(["evaluate.py", held_out, str(npz), "--weights", "none", "--classifier", str(classifier_of(task, args)),
          "--data-root", args.data_root, "--json", str(samples / "figures.json"),
          *(["--training-images", training] if sampler == EULER[0] else [])])  # then the floor is of as many real images
    return json.loads((samples / "figures.json").read_text())["figures"]


def write_table(args: Namespace) -> None:
    """Write table.md: a row a sampler of a stage, mean and standard deviation over the seeds, and the means above the floor."""
    results, lines = read_results(Path(args.results)), []
    for task in args.tasks:
        reports = [report for report in results.values() if report.get("task") == task]
        values = {(stage, sampler): [report["figures"][sampler.title] for report in reports if report["stage"] == stage]
                  for stage, samplers in STAGES.items() for sampler in samplers}
        values = {row: [[figure({"figures": found}, name)["value"] for name in FIGURES] for found in all_seeds]
                  for row, all_seeds in values.items() if all_seeds}
        if not values:
            continue
        floor = floors_of(task, reports, Path(args.compared))
        rows = [[stage, sampler.title, sampler.calls, len(all_seeds), *map(spread, zip(*all_seeds)),
                 *(f"{statistics.mean(column) - floor[i]:.3g}" for i, column in enumerate(list(zip(*all_seeds))[:2]))]
                for (stage, sampler), all_seeds in values.items()]
        lines += [f"## {task}", "", *table(
            ["network", "sampler", "calls", "seeds", *FIGURES, *(f"{name}, above the floor" for name in FIGURES[:2])],
            [*rows, ["real images", *3 * ["-"], *(f"{value:.3g}" for value in floor), "0", "0"]]), ""]
    if not lines:
        raise UserError(f"`results` {args.results} has no result of {' or '.join(args.tasks)}")
    write_text(Path(args.results) / "table.md", "\n".join(lines))
    print(f"Wrote {args.results}/table.md")


def floors_of(task: str, reports: list[dict], compared: Path) -> list[float]:
    """FIGURES of as many real images; for latents, compare.py's of images encoded and decoded."""
    if decoded := read_results(compared).get(f"{task}-reconstructions"):
        return [figure(decoded, name)["value"] for name in FIGURES]
    first = next(report["figures"][EULER[0].title] for report in reports if EULER[0].title in report["figures"])
    return [figure({"figures": first}, name)["floor"] for name in FIGURES]


ACTIONS = {"time": time_steps, "run": run_all, "table": write_table}


def main(args: Namespace) -> None:
    ACTIONS[args.what](args)


if __name__ == "__main__":
    cli.run(main, build_parser())
