"""The examples of docs/extending.md and docs/python.md run as they stand, and are short; links of the documents hold."""

import contextlib
import math
import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest
import torch
from conftest import ROOT, assert_one_line
from PIL import Image

import train
from diffusion import OBJECTIVES, create_diffusion, supported_arguments
from diffusion.flow import LOSSES, PREDICTIONS, TIME_SAMPLING
from diffusion.samplers import SAMPLERS
from diffusion.schedules import SCHEDULES
from models import DiT_models
from pipeline import checkpoint
from pipeline.heads import HEADS
from pipeline.settings import RECOMMENDED
from pipeline.spec import defaults_of
from runtime.cli import load_yaml
from training.datasets import NAMED
from training.runs import TrainerArgs
from training.state import OptimizerArgs

EXTENDING = (ROOT / "docs" / "extending.md").read_text()
PYTHON = (ROOT / "docs" / "python.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", EXTENDING, flags=re.S))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINING = (ROOT / "docs" / "training.md").read_text()
CHOICES = {"objective": OBJECTIVES, "noise_schedule": SCHEDULES, "time_sampling": TIME_SAMPLING, "flow_loss": LOSSES,
           "prediction": PREDICTIONS,
           "schedule": get_args(OptimizerArgs.__annotations__["schedule"]), "sampling": RECOMMENDED}


@pytest.fixture
def mine(tmp_path, monkeypatch, call_here):
    """A folder with the examples: `mine(script, *flags)` runs one there, as python does."""
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = {name.removesuffix(".py") for name in EXAMPLES}
    with contextlib.ExitStack() as registries:
        for registry in (HEADS, DiT_models, OBJECTIVES, SAMPLERS, NAMED):
            registries.enter_context(mock.patch.dict(registry))
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


def test_a_head_of_one_s_own_is_trained(mine):
    """Its loss is the formula, written out; and the document's command runs."""
    (command,) = re.findall(r"^python (mine.py train --model Gated.*)$", EXTENDING, flags=re.M)
    words = [*shlex.split(command), "--num-workers", 0, "--global-batch-size", 4, "--log-every", 1, "--run-name", "head"]
    result = mine(*words, "--max-steps", 2)
    assert result.returncode == 0, result.stderr
    assert "disperse" in Path("results/head/metrics.jsonl").read_text()
    out = torch.randn(3, 5)
    terms = [math.exp(-((out[i] - out[j]) ** 2).mean().item() / 0.5) for i in range(3) for j in range(3)]
    found = HEADS["disperse"](None).loss(out, None)
    assert found.tolist() == pytest.approx([math.log(sum(terms) / 9)] * 3, rel=1e-5)


def test_mine_runs_every_script(mine):
    """Each up to an error of its own, which names the script; a network of another file is not for diffusers."""
    allowed = "mine.py: error: the first word must be train, sample, sample_ddp, extract_features, evaluate, export"
    for words in ([], ["trian"], ["--ckpt", "train"]):
        assert_one_line(mine("mine.py", *words), allowed)
    flags = {"train": ["--data-path", "."], "sample": ["--ckpt", "none"], "sample_ddp": ["--ckpt", "none"],
             "extract_features": ["--data-path", "."], "evaluate": ["none", "none"], "export": ["--ckpt", "none", "--out", "x"],
             "benchmarks.classifier": ["--data-path", ".", "--out", "x.pt"]}
    for script, given in flags.items():
        assert_one_line(mine("mine.py", script, *given), f"mine.py {script}: error: ")
    assert "usage: mine.py sample [" in mine("mine.py", "sample", "--help").stdout

    train = ["--model", "Mine", "--data-path", "stripes", "--vae", "pixels", "--diffusion-args", '{"objective": "flow"}']
    few = ["--global-batch-size", 4, "--max-steps", 1, "--num-workers", 0, "--preview-every", 0, "--run-name", "mine"]
    assert mine("mine.py", "train", *train, *few).returncode == 0
    result = mine("mine.py", "export", "--ckpt", "results/mine", "--out", "folder", "--format", "diffusers")
    assert_one_line(result, "mine.py export: error: --format diffusers takes networks of models.py and small_models.py")
    assert mine(*shlex.split(result.stderr.rpartition("python ")[2])).returncode == 0
    assert Path("folder/model.safetensors").is_file()


def test_python_from_the_clone(tmp_path, monkeypatch, run_here):
    """The blocks of docs/python.md, of which the README has the first, run in order, in a folder with the clone's configs."""
    import export

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    Path("configs").symlink_to(ROOT / "configs")
    blocks, names = re.findall(r"```(bash|python)\n(.*?)```", PYTHON, flags=re.S), {}
    assert len(blocks) == 8
    assert blocks[0][1].count("\n") <= 15
    assert re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S) == [blocks[0][1]]
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, "docs/python.md", "exec"), names)
        else:
            assert run_here(export, *shlex.split(code)[2:]).returncode == 0
    for path, size in (("guided.png", (662, 134)), ("picture.png", (32, 32))):
        with Image.open(path) as picture:
            assert picture.size == size
    assert checkpoint.restore("tuned").spec == checkpoint.restore("configs/results/cifar-dinext-u").spec


def test_a_training_loop_runs_alone():
    exec(re.search(r"```python\n(import copy\n.*?)```", PYTHON, flags=re.S)[1], {})


def documented_arguments():
    """The table of --diffusion-args and --optimizer-args: {its groups' names: {key: (values, default)}}."""
    groups = {}
    for line in TRAINING.splitlines():
        if heading := re.fullmatch(r"\| \*\*(.*)\*\* \|{4}", line):
            keys = groups[frozenset(re.findall("`(.*?)`", heading[1]))] = {}
        elif row := re.fullmatch(r"\| `(\w+)` \| (.*) \| `(.*)` \| .* \|", line):
            keys[row[1]] = row[2], load_yaml(row[3])
    return groups


def accepted_arguments():
    """What train.py accepts, with its defaults, in the same groups."""
    defaults = {name: value for function in (create_diffusion, *OBJECTIVES.values())
                for name, value in defaults_of(function).items()} | vars(TrainerArgs())
    names = {objective: {*supported_arguments(objective)} for objective in OBJECTIVES}
    common = set.intersection(*names.values())
    groups = {frozenset(["--diffusion-args"]): {*common, *vars(TrainerArgs())}}
    for key in set.union(*names.values()) - common:
        groups.setdefault(frozenset(objective for objective in names if key in names[objective]), set()).add(key)
    described = {group: {key: defaults[key] for key in keys} for group, keys in groups.items()}
    return described | {frozenset(["--optimizer-args"]): vars(OptimizerArgs())}


def test_the_table_of_arguments_is_what_train_py_accepts():
    documented = {group: {key: default for key, (_, default) in keys.items()}
                  for group, keys in documented_arguments().items()}
    accepted = accepted_arguments()
    assert accepted == {group: {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
                        for group, keys in documented.items()}


def test_the_table_of_arguments_has_the_values_that_are_allowed(run_here):
    """Choices are those of the registries; of a number, the error about a wrong one says what the table says."""
    assert {*CHOICES} <= {key for keys in accepted_arguments().values() for key in keys}
    for group, keys in documented_arguments().items():
        flag = "--optimizer-args" if "--optimizer-args" in group else "--diffusion-args"
        for key, (values, default) in keys.items():
            if key in CHOICES or isinstance(default, bool):
                assert re.findall("`(.*?)`", values) == [*CHOICES.get(key, ["true", "false"])], key
                continue
            wrong = ".inf" if key == "time_mean" else "[-1, -1]" if isinstance(default, list) else "-1"
            objective = ["--diffusion-args.objective", min(group)] if min(group) in OBJECTIVES else []
            result = run_here(train, "--data-path", "digits", "--vae", "pixels", "--device", "cpu", *objective,
                              f"{flag}.{key}", wrong)
            assert_one_line(result, flag, f"{key} ", f"is not {values}\n")


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
