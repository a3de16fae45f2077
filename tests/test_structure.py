"""Who may import whom (see the file map of README.md), and that importing does nothing else."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

LIBRARIES = {"models", "diffusion", "autoencoders", "data", "metrics", "runtime", "checkpoint"}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - LIBRARIES
ALLOWED = {"checkpoint": {"models"}}
INSIDE_DIFFUSION = {
    "schedules": set(), "samplers": set(), "reuse": set(), "guidance": {"schedules"}, "flow": {"samplers", "schedules"},
    "gaussian_diffusion": {"samplers", "schedules"}, "__init__": {"flow", "gaussian_diffusion", "schedules"},
}


def imports(path):
    """Names of the modules that a file imports, at any depth of it: absolute ones, and relative ones with their dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names |= {f".{node.module}"} if node.module else {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("module", sorted(LIBRARIES - {"diffusion"}))
def test_libraries_import_none_of_each_other(module):
    assert imports(ROOT / f"{module}.py") & (LIBRARIES | SCRIPTS) <= ALLOWED.get(module, set())


@pytest.mark.parametrize("path", sorted((ROOT / "diffusion").glob("*.py")), ids=lambda path: path.stem)
def test_diffusion_knows_no_network(path):
    found = imports(path)
    assert not found & (LIBRARIES | SCRIPTS)
    assert {name[1:] for name in found if name.startswith(".")} <= INSIDE_DIFFUSION[path.stem]


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_of_the_scripts_only_sample_is_imported(script):
    assert imports(ROOT / f"{script}.py") & SCRIPTS <= {"sample"}


def test_importing_has_no_global_effects():
    """Neither threads, seeds, grad mode nor TF32 change, and diffusers, which is slow, is not loaded."""
    code = f"""
import sys, torch
state = lambda: (torch.initial_seed(), torch.is_grad_enabled(), torch.backends.cudnn.allow_tf32,
                 torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads(), torch.get_default_dtype())
before = state()
import {', '.join(sorted(LIBRARIES | SCRIPTS))}
assert state() == before
assert "diffusers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
