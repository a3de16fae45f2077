"""Twenty faults, and whether the tests see them: each is put into a copy of the checkout, and the tests must fail there.

    python tests/faults.py            # all of them
    python tests/faults.py EMA eta    # those with one of these words in their name

One line a fault: its name, whether a test saw it and which one first, seconds. Exit code 1 if a fault was not seen.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    """A bug: `old`, which `file` holds exactly once, becomes `new`. `tests` is where pytest looks for it, below tests/."""

    name: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    Fault("sign of v", "diffusion/gaussian_diffusion.py", '* noise - self._at("sigma"', '* noise + self._at("sigma"',
          "test_diffusion.py"),
    Fault("DDIM's eta", "diffusion/samplers.py", "(alpha_next * sigma)) ** 2)", "(alpha_next * sigma)))", "test_samplers.py"),
    Fault("EMA off by one", "train.py", "state.update_ema(args.ema_decay)\n        state.step += 1",
          "state.step += 1\n        state.update_ema(args.ema_decay)", "test_compatibility.py"),
    Fault("order of t's columns", "models.py", "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]",
          "test_models.py"),
    Fault("label drop", "training/objective.py", "drop_uniform < self.label_drop", "drop_uniform >= self.label_drop",
          "test_objective.py"),
    Fault("slice of noise on rank 1", "train.py", "draws.rows(rows)", "draws.rows(slice(len(labels)))",
          "test_train.py::test_one_process_and_two_with_accumulation_agree_to_rounding"),
    Fault("mirror share", "training/order.py", "0.5 if self.flip else 0.0", "0.5",
          "test_order.py::test_half_of_the_samples_are_mirrored"),
    Fault("grid of respacing", "diffusion/schedules.py", "start + round(position)", "start + int(position)",
          "test_diffusion.py"),
    Fault("gate order", "models.py", "scale, shift, gate = self", "scale, gate, shift = self", "test_models.py"),
    Fault("GRN mean", "models.py", "norm.mean(dim=-1,", "norm.mean(dim=0,", "test_models.py"),
    Fault("posterior's scale", "pipeline/autoencoders.py", "0.5 * log_variance.clamp", "log_variance.clamp",
          "test_autoencoders.py"),
    Fault("guidance on the wrong half", "diffusion/guidance.py", "conditional, unconditional = model",
          "unconditional, conditional = model", "test_guidance.py"),
    Fault("best.pt", "training/state.py", "self.best = loss if better else self.best", "self.best = loss",
          "test_state.py"),
    Fault("seam split", "models.py", "split) :], *state", "split) + 1 :], *state", "test_models.py"),
    Fault("resume's order", "train.py", "range(self.first, self.max_steps)", "range(self.max_steps - self.first)",
          "test_train.py::test_a_resumed_run_equals_an_unbroken_one_bit_for_bit"),
    Fault("npz order", "pipeline/drawing.py", "sorted(done + todo, key=lambda part: part.start)", "done + todo",
          "test_sample_ddp.py::test_a_stopped_output_is_continued_with_other_batches_no_image_lost_or_twice"),
    Fault("crop", "runtime/pictures.py", "Resampling.BICUBIC", "Resampling.BILINEAR", "test_pictures.py"),
    Fault("16-bit scale", "runtime/pictures.py", "- 1\n    levels", "\n    levels", "test_pictures.py"),
    Fault("sha check", "pipeline/checkpoint.py", "    verify(path)\n", "",
          "test_interruptions.py::test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used[bit-flipped]"),
    Fault("lock", "runtime/files.py", "fcntl.LOCK_EX |", "fcntl.LOCK_SH |", "test_files.py"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Put faults into a copy of the code, and see whether the tests fail.")
    parser.add_argument("words", nargs="*", help="faults with one of these words in their name; default: all")
    words = set(parser.parse_args().words)
    chosen = [fault for fault in FAULTS if not words or words & set(fault.name.split())]
    if missing := words - {word for fault in chosen for word in fault.name.split()}:
        parser.error(f"no fault has {', '.join(sorted(missing))} in its name")
    sys.exit(sum([not report(fault) for fault in chosen]) > 0)


def report(fault: Fault) -> bool:
    """Print the line of a fault. Returns whether a test saw it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        copy_checkout(copy)
        put(fault, copy)
        seen_by = first_failure(fault, copy, Path(folder) / "tests")
    print(f"{fault.name:28}{'seen' if seen_by else 'NOT SEEN':10}{time.perf_counter() - start:5.0f} s  {seen_by}", flush=True)
    return seen_by != ""


def copy_checkout(target: Path) -> None:
    """Copy the files that git tracks or does not ignore."""
    names = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # git lists a deleted one too
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def put(fault: Fault, checkout: Path) -> None:
    """Put a fault into a checkout. ValueError if the place is not exactly one: the list must follow the code."""
    path = checkout / fault.file
    code = path.read_text()
    if (count := code.count(fault.old)) != 1:
        raise ValueError(f"{fault.name}: {fault.file} holds {fault.old!r} {count} times; expected once")
    path.write_text(code.replace(fault.old, fault.new))


def first_failure(fault: Fault, checkout: Path, temporary: Path) -> str:
    """The first test that fails in a checkout; empty if all pass. RuntimeError if the tests do not run."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", f"--basetemp={temporary}",
         "--tb=no", f"tests/{fault.tests}"],
        cwd=checkout, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True)
    if result.returncode not in (0, 1):  # 1: a test failed
        raise RuntimeError(f"{fault.name}: pytest ended with {result.returncode}:\n{result.stdout}{result.stderr}")
    found = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", result.stdout, re.MULTILINE)
    return found[1] if found else ""


if __name__ == "__main__":
    main()
