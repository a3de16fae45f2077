"""What a script has imported when it shows its help or refuses a flag. Run as a script, this file lists it."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {str(path.relative_to(ROOT))[:-3].replace("/", ".") for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]
           if "build_parser())" in path.read_text()}
SLOW = {"timm", "torchvision", "diffusers", "transformers", "huggingface_hub", "scipy", "sklearn", "matplotlib", "sympy",
        "torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.fsdp", "torch_fidelity", "wandb", "mlflow"}


def test_no_script_imports_what_is_slow_before_it_needs_it():
    """Exact, not timed. What `import torch` alone imports is not counted."""
    listed = subprocess.run([sys.executable, __file__], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {script: (codes, slow) for script, codes, slow in map(json.loads, listed.splitlines())}
    assert found == {script: ([0, 2], []) for script in SCRIPTS}
    assert len(SCRIPTS) >= 6


def start(script):
    """The exit codes of --help and of a wrong flag, and which slow modules are loaded after them."""
    parser, codes = importlib.import_module(script).build_parser(), []
    for flag in ("--help", "--no-such-flag"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                parser.parse_args([flag])
            except SystemExit as exit:
                codes.append(exit.code)
    return codes, SLOW & set(sys.modules)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import torch  # noqa: F401  once; each script starts in a copy of this process

    already = SLOW & set(sys.modules)
    for name in sorted(SCRIPTS):
        if os.fork() == 0:
            codes, slow = start(name)
            print(json.dumps([name, codes, sorted(slow - already)]), flush=True)
            os._exit(0)
        os.wait()
