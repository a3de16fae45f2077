"""Compare networks by what they draw after the same compute time: DiT, DiNext and DiNext-U, with seeds and floors.

    python benchmarks/compare.py time       # once, on a quiet machine: the seconds of a training step of each network
    python benchmarks/compare.py list       # all runs in their order, with their steps and core-hours
    taskset -c 0 python benchmarks/compare.py run     # the runs that are missing; a second one beside it takes others
    python benchmarks/compare.py plot       # table.md and compare.png, from the results

`run` may be killed at any moment; the same command goes on. One JSON a run lies in --results, failures too. For `cifar` first

    VAE=benchmarks/results/compare/cifar-autoencoder
    python extract_features.py --vae $VAE --image-size 32 --data-path DATA/train --features-path features/cifar10/train

DATA is a folder of CIFAR-10's pictures, with `train` and `test`. The autoencoder and the classifiers lie in --results too: all
figures depend on them, and two computers do not train the same ones. The autoencoder's command was

    python train.py --config configs/cifar_autoencoder.yaml --max-steps 6000 --image-size 32 --data-path DATA/train

The protocol, written before the first run:

- The budget of a run is compute time: its seconds over the network's seconds a step, measured by `time` on a quiet machine,
  all networks in turn, on one thread. So it is a number of steps, which other load, kills and continuing do not change.
- What all networks of a task share: data, autoencoder, flow with logit-normal t, label drop 0.1, EMA 0.999, batch, AdamW
  (0.9, 0.95), 5 % of the steps to warm up, a cosine over the run; Euler in 25 steps, 5,000 samples, as many of each class, no
  guidance. The first seed is also sampled with guidance 1.5.
- Learning rates: LRS for each network, on a fifth of the steps, seed 0, by 2,000 samples. The range of a network grows by a
  factor of 2 while its best lies at an end. On `cifar` each family chooses among three shapes, patch 1 or 2, on the others
  DiT among two. The network and rate with the lowest FD-classifier go on.
- Then three seeds of each family with the whole budget, and cosine runs of their own over 1/8, 1/4 and 1/2 of it (seed 0).
- Step times of the networks of a task are within 10 % of their middle; parameters and multiply-accumulates are told.
- Figures: FD-classifier (the one that decides), FD-pixel32, label accuracy, nearest training image, each with its floor, the
  figure of real images. Where there is an autoencoder, the distance of reconstructed training images is told too: no
  denoiser can do better than that.

Changed on 2026-11-25, after the first searches and before any run of `cifar` with the whole budget: DiNext and DiNext-U had one
shape on `cifar`, where DiT had three. And the norm in GRN, 12 % of a step of DiNext-U there, was written anew. So the times
were measured again; the searches before had the older ones, so other numbers of steps. Each JSON tells its own. And the range
of rates now grows for every network, not only for the best of a family.

Added on 2026-11-26, before any run of `cifar` with the whole budget: ConvAdaLN, MinDiff's network of dense 3x3 convolutions, in
one shape, as a reference from outside. On the same day the machine of the searches was lost, and with it the autoencoder and
the classifiers. Those of --results were trained again by the same commands. The first ones served the search of `cifar` and all
runs of `mnist16`.

Added later on that day, after DiT's, DiNext's and DiNext-U's runs of the whole budget, and because of what changes had shown on
a fifth and a third of it (docs/comparison.md): DiNextV2 in DiNext's shape, and DiT with its labels' embeddings of deviation 1.
They take DiNext's and DiT's learning rate, without a search. A step of DiNextV2 takes 23 % less time than one of DiNext: the
rule of 10 % was for choosing shapes, and here the shape is given. DiT with other labels has DiT's seconds a step.
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
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from jsonargparse import Namespace
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.comparison import (
    GUIDANCE,
    SEEDS,
    TASKS,
    Network,
    Run,
    Task,
    hours,
    missing_runs,
    plan,
    read_results,
    steps_of,
    write_report,
)
from diffusion import create_diffusion
from evaluation.image_sets import save_npz
from pipeline.autoencoders import latents_of, load_autoencoder
from runtime import UserError, cli
from runtime.files import check_writable, in_batches, lock_folder, read_json, write_json
from runtime.pictures import to_uint8
from runtime.processes import start_world
from runtime.randomness import generator
from small_models import DIFFUSION_NETWORKS
from training.datasets import load_dataset
from training.rows import Rows
from training.state import OptimizerArgs, Training

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = {"search": 2000, "main": 5000, "curve": 5000}  # of a run
ROUNDS = 15  # of timed steps
FLOW = {"objective": "flow", "time_sampling": "logit-normal"}


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Compare networks by what they draw after the same compute time.")
    parser.add_argument("what", choices=list(ACTIONS), help="time first, then run; list and plot at any time")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="in this order")
    parser.add_argument("--results", default="benchmarks/results/compare", help="folder of JSON, classifiers, table and figure")
    parser.add_argument("--work", default="results/compare", help="folder of runs and samples")
    parser.add_argument("--data-root", default="data", help="where MNIST lies")
    parser.add_argument("--cifar", default="data/cifar10-jpg", help="CIFAR-10's pictures, with train and test")
    parser.add_argument("--cifar-features", default="features/cifar10/train", help="their latents, mirrored ones too")
    return parser


# --- time --------------------------------------------------------------------------------------------


def time_steps(args: Namespace) -> None:
    """Write TASK-times.json: the median seconds of a training step of each network.

    The times that stand there stay, as budgets depend on them. A network that was added later is measured beside all the
    others; its seconds are scaled by what the others took at first over what they take now, the median.
    """
    torch.set_num_threads(1)
    start_world("cpu")  # as train.py does
    check_writable(args.results)
    for name in args.tasks:
        task, path = TASKS[name], Path(args.results) / f"{name}-times.json"
        networks = {title: network for family in task.families.values() for title, network in family.items()}
        first = read_json(path) if path.exists() else {"batch_size": task.batch_size, "rounds": ROUNDS, "networks": {}}
        if networks.keys() <= first["networks"].keys():
            raise UserError(f"{path} has all networks, and budgets depend on it; delete it to measure anew")
        now = time_networks(name, task, networks)
        ratios = [old["seconds"] / now[title]["seconds"] for title, old in first["networks"].items() if title in now]
        scale = statistics.median(ratios) if ratios else 1.0
        added = {title: own | {key: scale * own[key] for key in ("seconds", "fastest", "slowest")} | {"scale": scale, **about()}
                 for title, own in now.items()}
        write_json(path, first | {"networks": added | first["networks"]})


def time_networks(name: str, task: Task, networks: dict[str, Network]) -> dict[str, dict]:
    """Time a training step of each network, all in turn, on one thread."""
    networks = {title: build(network, task.shape) for title, network in networks.items()}
    calls = {title: training_step(network, task) for title, network in networks.items()}
    seconds = {title: [] for title in calls}
    for _ in tqdm(range(ROUNDS + 2), f"{name}: rounds of steps"):
        for title, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[title].append(time.perf_counter() - start)
    return {title: {"seconds": statistics.median(own[2:]), "fastest": min(own[2:]), "slowest": max(own[2:]),
                    "parameters": sum(p.numel() for p in networks[title].parameters() if p.requires_grad),
                    "macs": count_macs(networks[title])} for title, own in seconds.items()}


def build(network: Network, shape: tuple[int, int, int]) -> torch.nn.Module:
    name, changes = network
    return DIFFUSION_NETWORKS[name](**{"input_size": shape[1:], "in_channels": shape[0], "num_classes": 10,
                                       "learn_sigma": False} | changes)


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


def count_macs(model: torch.nn.Module) -> int:
    """Multiply-accumulates of one image's forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, model.in_channels, *model.input_size), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() // 2


# --- list, run ---------------------------------------------------------------------------------------


def list_runs(args: Namespace) -> None:
    results = read_results(Path(args.results))
    for task in args.tasks:
        runs = plan(task, results)
        for run in runs:
            state = "-" if run.name not in results else "failed" if "failed" in results[run.name] else "done"
            print(f"{state:6} {run.stage:6} {steps_of(run, results):6} steps {60 * hours(run):5.1f} min  {run.name}")
        more = ", then what the search decides" if runs[-1].stage == "search" else ""
        print(f"{task}: {sum(map(hours, runs)):.2f} core-hours of training{more}", flush=True)


def run_all(args: Namespace) -> None:
    """Do what is missing, the worthiest first. Several of these may run beside each other."""
    folder, work = Path(args.results), Path(args.work)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the script that it has called ends too
    for task in args.tasks:
        check_data(task, args)
    check_writable(work)
    list_runs(args)
    for task in args.tasks:
        prepare(task, args)
        while missing := missing_runs(task, folder):
            run = next((run for run in missing if claim(work / "claims" / run.name)), None)
            if run is None:
                time.sleep(10)  # others are at work on them; what they find may call for more runs
            elif run in missing_runs(task, folder):  # and not done by another one since
                write_json(folder / f"{run.name}.json", execute(run, steps_of(run, read_results(folder)), args))


def check_data(task: str, args: Namespace) -> None:
    """Refuse a task whose images are not there, before another task takes hours."""
    for flag in ("cifar", "cifar_features"):
        if f"{{{flag}}}" in " ".join([TASKS[task].data, *TASKS[task].real]) and not Path(args[flag]).is_dir():
            raise UserError(f"`{flag}` {args[flag]} is not a folder; the docstring of benchmarks/compare.py has the commands")
    load_dataset(expand(TASKS[task].data, args)[1], data_root=args.data_root)


def claim(folder: Path) -> bool:
    """Whether this process may do the work of this name. It has it until it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock_folder(folder, False, "")
    except UserError:
        return False
    return True


def prepare(task: str, args: Namespace) -> None:
    """A classifier of the task's images, and the figures of reconstructed images where there is an autoencoder."""
    classifier, floor = classifier_of(task, args), Path(args.results) / f"{task}-reconstructions.json"
    wanted = [classifier, *([floor] if "cifar_features" in TASKS[task].data else [])]
    while not all(path.exists() for path in wanted) and not claim(Path(args.work) / "claims" / task):
        time.sleep(10)  # another one is making them
    if not classifier.exists():
        call(["benchmarks/classifier.py", *expand(TASKS[task].classifier, args), "--data-root", args.data_root, "--out",
              str(classifier)])
    if floor in wanted and not floor.exists():
        npz = Path(args.work) / "reconstructions" / "samples.npz"
        npz.parent.mkdir(exist_ok=True)
        reconstruct(args.cifar_features, npz)
        write_json(floor, about() | {"figures": evaluate(task, npz, args, training=True)})


@torch.no_grad()
def reconstruct(features: str, path: Path) -> None:
    """Decode the latents of as many training images as a run has samples."""
    data = load_dataset(features)
    autoencoder = load_autoencoder(data.made_by["vae"], statistics=data.statistics)
    count = SAMPLES["main"]
    rows = torch.randperm(len(data), generator=generator("floor"))[:count].numpy()
    images, labels = [], []
    for batch in in_batches(count, 100):
        latents, own = data.__getitems__(Rows.plain(rows[batch]))
        images.append(to_uint8(autoencoder.decode(latents_of(autoencoder, latents, data.kind, None))).numpy())
        labels += own.tolist()
    save_npz(path, (count, *images[0].shape[1:]), images, arr_1=labels)


def execute(run: Run, steps: int, args: Namespace) -> dict:
    """Train, sample and measure. Returns what the run's JSON holds."""
    task, folder = TASKS[run.task], Path(args.work) / run.name
    preset, changes = task.families[run.family][run.network]
    train = ["train.py", *expand(task.data, args), "--data-root", args.data_root, "--model", preset,
             "--model-args", json.dumps(changes), "--diffusion-args", json.dumps(FLOW), "--optimizer-args",
             json.dumps({"betas": [0.9, 0.95], "warmup_steps": steps // 20, "schedule": "cosine"}), "--lr", str(run.lr),
             "--ema-decay", "0.999", "--global-batch-size", str(task.batch_size), "--max-steps", str(steps),
             "--global-seed", str(run.seed), "--num-workers", "0", "--ckpt-every", "200", "--keep-last", "1",
             "--preview-every", "0", "--results-dir", args.work, "--run-name", run.name]
    result = run._asdict() | {"share": float(run.share), "steps": steps, "preset": preset, "model_args": changes,
                              "seconds": task.seconds * float(run.share), **about(), "command": shlex.join(train)}
    if failure := call(train, may_fail=True):
        return result | {"failed": failure}
    result["loss"] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    first = run.stage == "main" and run.seed == SEEDS[0]
    for name, scale in {"figures": 1.0, **({"guided": GUIDANCE} if first else {})}.items():
        call(["sample_ddp.py", "--ckpt", str(folder / f"checkpoints/{steps:07d}.pt"), "--balanced", "--num-fid-samples",
              str(SAMPLES[run.stage]), "--per-proc-batch-size", "250", "--sampler", "euler", "--num-sampling-steps", "25",
              "--cfg-scale", str(scale), "--sample-dir", str(folder / name)])
        (npz,) = (folder / name).glob("*.npz")
        result[name] = evaluate(run.task, npz, args, training=run.stage == "main")
    return result


def evaluate(task: str, npz: Path, args: Namespace, training: bool) -> list[dict]:
    """evaluate.py's figures of samples; `training`: the nearest training images too, and floors of training images."""
    held_out, train = expand(" ".join(TASKS[task].real), args)
    out = npz.with_name("figures.json")
    call(["evaluate.py", held_out, str(npz), "--weights", "none", "--classifier", str(classifier_of(task, args)),
          "--data-root", args.data_root, *(["--training-images", train] if training else []), "--json", str(out)])
    return json.loads(out.read_text())["figures"]


def expand(flags: str, args: Namespace) -> list[str]:
    return [flag.format(**args.as_dict()) for flag in flags.split()]


def classifier_of(task: str, args: Namespace) -> Path:
    return Path(args.results) / f"classifier-{task}.pt"


def call(command: list[str], may_fail: bool = False) -> str | None:
    """Run one of the scripts on one thread. Returns its error, the last line, if it fails with one and `may_fail`."""
    print(f"{time.strftime('%H:%M:%S')} {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode == 2 and "another process is at work" in done.stderr:
        time.sleep(10)  # a run of this script was killed, and what it had called lives on
        return call(command, may_fail)
    if done.returncode and not (may_fail and done.returncode == 2):
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def about() -> dict[str, str]:
    """Where and of what code a figure is."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {"device": f"cpu, 1 thread, {platform.machine()}", "torch": torch.__version__, "date": f"{date.today()}",
            "commit": git.stdout.strip()}


def plot(args: Namespace) -> None:
    write_report(Path(args.results), args.tasks)
    print(f"Wrote {args.results}/table.md and {args.results}/compare.png")


ACTIONS = {"time": time_steps, "list": list_runs, "run": run_all, "plot": plot}


def main(args: Namespace) -> None:
    ACTIONS[args.what](args)


if __name__ == "__main__":
    cli.run(main, build_parser())
