"""Which file may import which (the README's map), and that importing is quick and does nothing else."""

import ast
import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = """
runtime/__init__ runtime/files runtime/npz runtime/randomness runtime/pictures runtime/processes runtime/cli runtime/log
diffusion/process diffusion/schedules diffusion/samplers diffusion/gaussian_diffusion diffusion/flow diffusion/flow_map
diffusion/guidance diffusion/reuse diffusion/__init__
models small_models
pipeline/__init__ pipeline/settings pipeline/spec pipeline/weights pipeline/published pipeline/interchange
pipeline/checkpoint pipeline/autoencoders pipeline/encoders pipeline/heads pipeline/generation pipeline/drawing
training/__init__ training/rows training/features training/parquet training/datasets training/order training/objective
training/state training/runs training/initial training/previews
evaluation/__init__ evaluation/metrics evaluation/image_sets evaluation/extractors evaluation/survey evaluation/figures
evaluation/monitor
exported
""".split()  # a file imports those that stand before it
SCRIPTS = ["train", "sample", "sample_ddp", "extract_features", "evaluate", "export"]
BENCHMARKS = [f"benchmarks/{path.stem}" for path in (ROOT / "benchmarks").glob("*.py")]
PARSERS = sorted(name.replace("/", ".") for name in [*SCRIPTS, *BENCHMARKS]
                 if "build_parser())" in (ROOT / f"{name}.py").read_text())
SLOW = {"timm", "torchvision", "diffusers", "transformers", "huggingface_hub", "scipy", "sklearn", "matplotlib", "sympy",
        "torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.fsdp", "torch_fidelity", "wandb", "mlflow"}
LINES = {"models": 800}  # at most; any other file 350


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


def test_a_file_imports_only_what_stands_before_it():
    wrong = {name: later for i, name in enumerate(ORDER) if (later := imported(name) - set(ORDER[:i]))}
    assert not wrong
    assert "runtime/cli" in imported("train")  # so imports are seen at all


def test_nothing_imports_a_script():
    assert not {name: found for name in [*SCRIPTS, *BENCHMARKS] if (found := imported(name) & set(SCRIPTS))}


def test_files_are_short():
    lines = {name: (ROOT / f"{name}.py").read_text().count("\n") for name in [*ORDER, *SCRIPTS]}
    assert not {name: count for name, count in lines.items() if count > LINES.get(name, 350)}


def test_importing_has_no_global_effects_and_no_script_imports_what_is_slow_before_it_needs_it():
    """Threads, seeds, grad mode and TF32 stay. What `import torch` alone imports is not counted."""
    listed = subprocess.run([sys.executable, __file__], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(listed) == {script: [[0, 2], []] for script in PARSERS} | {"changed": []}
    assert len(PARSERS) >= len(SCRIPTS)


# --- in a process of its own -----------------------------------------------------------------------


def exit_codes(script):
    """Of --help and of a wrong flag."""
    parser, codes = importlib.import_module(script).build_parser(), []
    for flag in ("--help", "--no-such-flag"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                parser.parse_args([flag])
            except SystemExit as exit:
                codes.append(exit.code)
    return codes


def settings():
    return {"seed": torch.initial_seed(), "grad": torch.is_grad_enabled(), "threads": torch.get_num_threads(),
            "dtype": torch.get_default_dtype(), "cudnn": torch.backends.cudnn.allow_tf32,
            "matmul": torch.backends.cuda.matmul.allow_tf32}


if __name__ == "__main__":
    import torch

    sys.path[0] = str(ROOT)
    before, already, found = settings(), SLOW & set(sys.modules), {}
    for script in PARSERS:
        found[script] = [exit_codes(script), sorted(SLOW & set(sys.modules) - already)]
    for module in ORDER:
        if module != "exported":  # a pipeline of diffusers, whose source export.py copies
            importlib.import_module(module.removesuffix("/__init__").replace("/", "."))
    after = settings()
    print(json.dumps(found | {"changed": [name for name in before if before[name] != after[name]]}))
