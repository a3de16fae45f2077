"""Compare networks by what they draw after the same compute time, with seeds and floors.

    python benchmarks/compare.py time       # once, on a quiet machine: the seconds of a training step of each network
    python benchmarks/compare.py list       # all runs in their order, with their steps and core-hours
    taskset -c 0 python benchmarks/compare.py run     # the missing runs; a second process beside it takes others
    python benchmarks/compare.py plot       # table.md and compare.png, from the results

`run` may be killed at any moment; the same command continues. Each run writes one JSON to --results, also if it fails. All
figures depend on the autoencoder and the classifiers in --results; two computers do not train the same ones. The protocol,
written before the first run, and how to get the pictures and latents of `cifar`, are in docs/comparison.md.
"""

import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import ChainMap
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from jsonargparse import Namespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import comparison
from benchmarks.candidates import CANDIDATES
from benchmarks.comparison import TASKS, Network, Run, Task, missing_runs, plan, read_results, steps_of
from benchmarks.instruments import count_macs, time_in_turn
from diffusion import create_diffusion
from runtime import UserError, cli
from runtime.files import check_writable, lock_folder, read_json, write_json
from runtime.processes import start_world
from small_models import DIFFUSION_NETWORKS
from training.datasets import load_dataset
from training.state import OptimizerArgs, Training

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = {"search": 2000, "trial": 5000, "main": 5000, "curve": 5000}  # of a run
ROUNDS = 30  # of timed steps
FLOW = {"objective": "flow", "time_sampling": "logit-normal"}


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Compare networks by what they draw after the same compute time.")
    parser.add_argument("what", choices=list(ACTIONS), help="time first, then run; list and plot at any time")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="in this order")
    parser.add_argument("--results", default="benchmarks/results/compare", help="folder of JSON, classifiers, table and figure")
    parser.add_argument("--work", default="results/compare", help="folder of runs and samples")
    add_task_arguments(parser)
    return parser


def add_task_arguments(parser: cli.ArgumentParser) -> None:
    """Add the flags that stand in TASKS: where their data lie."""
    parser.add_argument("--data-root", default="data", help="where MNIST lies")
    parser.add_argument("--cifar", default="data/cifar10-jpg", help="CIFAR-10's pictures, with train and test")
    parser.add_argument("--cifar-features", default="features/cifar10/train", help="their latents, mirrored ones too")
    parser.add_argument("--cifar16-features", default="features/cifar10-16/train", help="their latents of 4x16x16")


def time_steps(args: Namespace) -> None:
    """Write TASK-times.json: the median seconds of a training step of each network.

    Times in an existing file are kept, as budgets depend on them. A network that was added later is measured beside all
    others; its seconds are scaled by the median ratio of the others' stored seconds to their seconds now.
    """
    torch.set_num_threads(1)
    start_world("cpu")  # as train.py does
    check_writable(args.results)
    reports = {}
    for name in args.tasks:
        path = Path(args.results) / f"{name}-times.json"
        networks = {title: network for family in TASKS[name].families.values() for title, network in family.items()}
        report = read_json(path) if path.exists() else {"batch_size": TASKS[name].batch_size, "networks": {}}
        if not networks.keys() <= report["networks"].keys():
            reports[path] = TASKS[name], networks, report
    if not reports:
        raise UserError(f"{path} has all networks, and budgets depend on it; delete it to measure again")
    for path, (task, networks, report) in reports.items():
        stored, now = report["networks"], time_networks(task, networks)
        ratios = [stored[title]["seconds"] / now[title]["seconds"] for title in stored.keys() & now.keys()]
        scale = statistics.median(ratios) if ratios else 1.0
        for title in now.keys() - stored.keys():
            scaled = {key: scale * now[title][key] for key in ("seconds", "fastest", "slowest")}
            stored[title] = now[title] | scaled | {"scale": scale, "rounds": ROUNDS, **about()}
        write_json(path, report)


def time_networks(task: Task, networks: dict[str, Network]) -> dict[str, dict]:
    """Time a training step of each network, all in turn, on one thread."""
    models = {title: build(network, task.shape) for title, network in networks.items()}
    calls = {title: training_step(model, task) for title, model in models.items()}
    return {title: {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds),
                    "parameters": sum(p.numel() for p in models[title].parameters() if p.requires_grad),
                    "macs": count_macs(partial(build, networks[title], task.shape), task.shape)}
            for title, seconds in time_in_turn(calls, ROUNDS, torch.device("cpu"), "rounds of steps").items()}


def build(network: Network, shape: tuple[int, int, int]) -> torch.nn.Module:
    name, changes = network
    networks = ChainMap(CANDIDATES, DIFFUSION_NETWORKS)
    data = {"input_size": shape[1:], "in_channels": shape[0], "num_classes": 10, "learn_sigma": False}
    return networks[name](**data | changes)


def training_step(model: torch.nn.Module, task: Task) -> Callable[[], None]:
    """What train.py does in a step, without reading data, as a function without arguments."""
    process = create_diffusion("", **FLOW)
    state, draws = Training.begin(model, 1e-3, OptimizerArgs()), torch.Generator().manual_seed(0)
    x, y = torch.randn(task.batch_size, *task.shape), torch.randint(10, (task.batch_size,))

    def step() -> None:
        noise, t = torch.randn(x.shape, generator=draws), process.sample_times(task.batch_size, draws)
        loss = process.training_losses(model, x, t, dict(y=y), noise)["loss"].mean()
        loss.backward()
        state.opt.found_inf = state.meter.update({"loss": loss.detach()}, state.clip_gradients(math.inf))
        state.opt.step()
        state.opt.zero_grad(set_to_none=True)
        state.update_ema(0.999)
        state.step += 1

    return step


def list_runs(args: Namespace) -> None:
    results = read_results(Path(args.results))
    for task in args.tasks:
        runs = plan(task, results)
        for run in runs:
            state = "-" if run.name not in results else "failed" if "failed" in results[run.name] else "done"
            print(f"{state:6} {run.stage:6} {steps_of(run, results):6} steps {run.seconds / 60:5.1f} min  {run.name}")
        searching = any(run.stage == "search" and run.name not in results for run in runs)
        more = ", then what the search decides" if searching else ""
        print(f"{task}: {sum(run.seconds for run in runs) / 3600:.2f} core-hours of training{more}", flush=True)


def run_all(args: Namespace) -> None:
    """Do the missing runs, the most useful first. Several processes may share the work."""
    folder, claims = Path(args.results), Path(args.work) / "claims"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the script that it has called ends too
    for task in args.tasks:  # refuse missing images before other tasks take hours
        for flag in ("cifar", "cifar_features", "cifar16_features"):
            if f"{{{flag}}}" in " ".join([TASKS[task].data, *TASKS[task].real]) and not Path(args[flag]).is_dir():
                raise UserError(f"`{flag}` {args[flag]} is not a folder; see docs/comparison.md")
        load_dataset(expand(TASKS[task].data, args)[1], data_root=args.data_root)
    check_writable(args.work)
    list_runs(args)
    for task in args.tasks:
        judge = TASKS[task].judge or task
        while not train_classifier(classifier_of(task, args), TASKS[judge].classifier, claims / judge, args):
            time.sleep(10)
        while missing := missing_runs(task, folder):
            run = next((run for run in missing if claim(claims / run.name)), None)
            if run is None:
                time.sleep(10)  # other processes are doing them; their results may call for more runs
            elif run in missing_runs(task, folder):  # not done by another process meanwhile
                write_json(folder / f"{run.name}.json", execute(run, steps_of(run, read_results(folder)), args))


def train_classifier(out: Path, flags: str, claimed: Path, args: Namespace) -> bool:
    """Train the classifier `out` by classifier.py, unless it exists or another process is at it. Returns whether it exists."""
    if not out.exists() and claim(claimed):
        call(["benchmarks/classifier.py", *expand(flags, args), "--data-root", args.data_root, "--out", str(out)])
    return out.exists()


def claim(folder: Path) -> bool:
    """Whether this process may do the work of this name. The claim lasts until the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock_folder(folder, False, "")
    except UserError:
        return False
    return True


def execute(run: Run, steps: int, args: Namespace) -> dict:
    """Train, sample and measure. Returns what the run's JSON holds."""
    task, folder = TASKS[run.task], Path(args.work) / run.name
    preset, changes = task.families[run.family][run.network]
    train = [*script("train", preset), *expand(task.data, args), "--data-root", args.data_root, "--model", preset,
             "--model-args", json.dumps(changes), "--diffusion-args", json.dumps(FLOW), "--optimizer-args",
             json.dumps({"betas": [0.9, 0.95], "warmup_steps": steps // 20, "schedule": "cosine"}), "--lr", str(run.lr),
             "--ema-decay", "0.999", "--global-batch-size", str(task.batch_size), "--max-steps", str(steps),
             "--global-seed", str(run.seed), "--num-workers", "0", "--ckpt-every", "200", "--keep-last", "1",
             "--preview-every", "0", "--results-dir", args.work, "--run-name", run.name]
    result = run._asdict() | {"share": float(run.share), "steps": steps, "preset": preset, "model_args": changes,
                              "seconds": run.seconds, **about(), "command": shlex.join(train)}
    if failure := call(train, may_fail=True):
        return result | {"failed": failure}
    result["loss"] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    first = run.stage in ("trial", "main") and run.seed == task.seeds[0]
    for name, scale in {"figures": 1.0, **({"guided": comparison.GUIDANCE} if first else {})}.items():
        call([*script("sample_ddp", preset), "--ckpt", str(folder / f"checkpoints/{steps:07d}.pt"), "--balanced",
              "--num-fid-samples", str(SAMPLES[run.stage]), "--per-proc-batch-size", "250", "--sampler", "euler",
              "--num-sampling-steps", "25", "--cfg-scale", str(scale), "--sample-dir", str(folder / name)])
        result[name] = evaluate(run, folder / name, args)
    return result


def script(name: str, preset: str) -> list[str]:
    """The words before a script's flags. A network on trial is known only where candidates.py registers it."""
    return ["benchmarks/candidates.py", name] if preset in CANDIDATES else [f"{name}.py"]


def evaluate(run: Run, folder: Path, args: Namespace) -> list[dict]:
    """evaluate.py's figures of the samples in a folder; for whole budgets the nearest training images too."""
    (npz,) = folder.glob("*.npz")
    held_out, training = expand(" ".join(TASKS[run.task].real), args)
    call(["evaluate.py", held_out, str(npz), "--weights", "none", "--classifier", str(classifier_of(run.task, args)),
          "--data-root", args.data_root, *(["--training-images", training] if run.stage in ("trial", "main") else []),
          "--json", str(folder / "figures.json")])
    return json.loads((folder / "figures.json").read_text())["figures"]


def expand(flags: str, args: Namespace) -> list[str]:
    return [flag.format(**args.as_dict()) for flag in flags.split()]


def classifier_of(task: str, args: Namespace) -> Path:
    return Path(args.results) / f"classifier-{TASKS[task].judge or task}.pt"


def call(command: list[str], may_fail: bool = False) -> str | None:
    """Run a script on one thread. With `may_fail`, returns the last line of its error if it exits with code 2."""
    print(f"{time.strftime('%H:%M:%S')} {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode == 2 and "another process is at work" in done.stderr:
        time.sleep(10)  # a killed process of this script left it running
        return call(command, may_fail)
    if done.returncode and not (may_fail and done.returncode == 2):
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def about() -> dict[str, str]:
    """The machine and the code behind a figure."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {"device": f"cpu, 1 thread, {platform.machine()}", "torch": torch.__version__, "date": f"{date.today()}",
            "commit": git.stdout.strip()}


def plot(args: Namespace) -> None:
    comparison.write_report(Path(args.results), args.tasks)
    print(f"Wrote {args.results}/table.md and {args.results}/compare.png")


ACTIONS = {"time": time_steps, "list": list_runs, "run": run_all, "plot": plot}


def main(args: Namespace) -> None:
    ACTIONS[args.what](args)


if __name__ == "__main__":
    cli.run(main, build_parser())
