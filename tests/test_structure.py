"""Which file may import which (the README's map), and that importing does nothing else."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ORDER = """
runtime/__init__ runtime/files runtime/randomness runtime/pictures runtime/processes runtime/cli runtime/log
diffusion/process diffusion/schedules diffusion/samplers diffusion/gaussian_diffusion diffusion/flow diffusion/guidance
diffusion/reuse diffusion/__init__
models small_models
pipeline/__init__ pipeline/spec pipeline/interchange pipeline/checkpoint pipeline/autoencoders pipeline/generation
pipeline/exported
training/__init__ training/rows training/features training/parquet training/datasets training/order training/objective
training/state training/runs training/previews
evaluation/__init__ evaluation/metrics evaluation/image_sets evaluation/extractors evaluation/survey evaluation/figures
""".split()  # a file imports those that stand before it
SCRIPTS = ["train", "sample", "sample_ddp", "extract_features", "evaluate", "export"]
LINES = {"models": 620}  # at most; of any other file, about 350


def imported(name):
    """The files of this project that a file imports, at any depth of its code."""
    folder = name.split("/")[0] if "/" in name else ""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            modules = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(filter(None, [folder, node.module])) if node.level else node.module
            modules = [(package, alias.name) for alias in node.names]
        else:
            continue
        for package, member in modules:
            path = package.replace(".", "/")
            candidates = [f"{path}/{member}", path, f"{path}/__init__"]
            found |= set([c for c in candidates if c in ORDER or c in SCRIPTS][:1])
    return found


def test_every_file_has_its_place():
    there = {str(path.relative_to(ROOT))[:-3] for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
             if path.parts[len(ROOT.parts)] not in ("tests", "benchmarks") and not path.parts[len(ROOT.parts)].startswith(".")}
    assert there == {*ORDER, *SCRIPTS}


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_before_it(name):
    assert imported(name) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", [*SCRIPTS, *(f"benchmarks/{path.stem}" for path in (ROOT / "benchmarks").glob("*.py"))])
def test_nothing_imports_a_script(name):
    assert not imported(name) & set(SCRIPTS)


@pytest.mark.parametrize("name", [*ORDER, *SCRIPTS])
def test_files_are_short(name):
    assert (ROOT / f"{name}.py").read_text().count("\n") <= LINES.get(name, 350)


def test_importing_has_no_global_effects():
    """Neither threads, seeds, grad mode nor TF32 change, and diffusers, which is slow, is not loaded.

    But by pipeline/exported.py, the source of a pipeline of diffusers, which only export.py reads.
    """
    modules = [name.replace("/__init__", "").replace("/", ".") for name in [*ORDER, *SCRIPTS] if name != "pipeline/exported"]
    code = f"""
import sys, torch
state = lambda: (torch.initial_seed(), torch.is_grad_enabled(), torch.backends.cudnn.allow_tf32,
                 torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads(), torch.get_default_dtype())
before = state()
import {', '.join(modules)}
assert state() == before
assert "diffusers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
