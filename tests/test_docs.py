"""The examples of docs/extending.md run as they stand, and are short; links and commands of the documents hold."""

import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, assert_one_line
from PIL import Image

from diffusion import OBJECTIVES
from diffusion.samplers import SAMPLERS
from models import DiT_models
from training.datasets import NAMED

EXTENDING = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", EXTENDING, flags=re.S))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def mine(tmp_path, monkeypatch, call_here):
    """A folder with the examples: `mine(script, *flags)` runs one there, as python does."""
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = {name.removesuffix(".py") for name in EXAMPLES}
    with mock.patch.dict(DiT_models), mock.patch.dict(OBJECTIVES), mock.patch.dict(SAMPLERS), mock.patch.dict(NAMED):
        yield lambda *words: call_here(lambda: runpy.run_path(words[0], run_name="__main__"), *words)
    for name in modules & set(sys.modules):
        del sys.modules[name]


def test_all_additions_train_and_sample_together(mine, monkeypatch):
    """The commands of the document. Its examples are short."""
    assert len(EXAMPLES) == 7
    assert max(code.strip().count("\n") + 1 for code in EXAMPLES.values()) <= 30
    commands = re.search(r"```bash\n(python mine.*?)```", EXTENDING, flags=re.S)[1].replace("\\\n", " ").strip().splitlines()
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)[1:]
        result = mine(*words, "--device", "cpu", *(["--num-workers", "0"] if "train" in words else []))
        assert result.returncode == 0, result.stderr
    assert Image.open("sample.png").text["sampler"] == "jump"
    sample = ["mine.py", "sample", "--ckpt", "results/mine", "--out", "x.png"]
    assert_one_line(mine(*sample, "--reuse", "encoder"), "--reuse encoder needs",
                    "Mine lacks blocks, default_split, condition, encode, decode")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert not Path("x.png").exists()
    assert mine(*sample, "--compile", "--num-sampling-steps", 2).returncode == 0


def test_a_network_of_other_blocks_has_the_seam(mine):
    flags = ["--model", "Gated", "--data-path", "stripes", "--vae", "pixels", "--global-batch-size", 16, "--max-steps", 2]
    assert mine("mine.py", "train", *flags, "--run-name", "gated", "--num-workers", 0).returncode == 0
    result = mine("mine.py", "sample", "--ckpt", "results/gated", "--num-sampling-steps", 8, "--reuse", "encoder")
    assert result.returncode == 0, result.stderr


def test_the_training_loop_runs(mine):
    assert mine("my_loop.py").returncode == 0


def test_links_lead_somewhere():
    anchors = {path: set(map(slug, re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M))) for path in DOCUMENTS}
    checked, broken = 0, []
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)]+)\)|(?:src)=\"([^\"]+)\"", text):
            target = "".join(link).replace("\\_", "_")
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            path = (document.parent / path).resolve() if path else document
            checked += 1
            if not path.exists() or (anchor and anchor not in anchors[path]):
                broken.append((document.name, target))
    assert not broken
    assert checked > 20


def slug(heading):
    """As GitHub makes anchors of headings."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-")
