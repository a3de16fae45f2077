import importlib
import itertools
import json
import math
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line, randomised
from matplotlib.figure import Figure
from torch import nn

from benchmarks import compare, comparison
from benchmarks.candidates import CANDIDATES, PARTS, Parts, PartsBlock
from benchmarks.comparison import Run, plan, search, steps_of
from pipeline.spec import ModelSpec
from small_models import NETWORKS as REGISTERED
from small_models import ConvAdaLN, Small_models

NETWORKS = ["DiT/1 40x2", "DiT/2 64x4"]


def result(value, floor=0.5):
    names = zip(comparison.FIGURES, itertools.count(value))
    return {"figures": [{"name": name, "value": number, "floor": floor} for name, number in names]}


def searched(distances, networks=NETWORKS):
    """Results in which a network's distance at a learning rate is distances(network, lr)."""
    results = {}
    for _ in range(10):
        runs, best = search("digits", "DiT", networks, results)
        if best:
            return results, best
        results |= {run.name: result(distances(run.network, run.lr)) for run in runs}
    return results, None


@pytest.mark.parametrize(("minimum", "best_lr", "tried"), [
    (0.4e-3, 0.375e-3, [0.1875e-3, 0.375e-3, 0.75e-3, *comparison.LRS]),
    (20e-3, 24e-3, [*comparison.LRS, 12e-3, 24e-3, 48e-3])])
def test_the_range_grows_only_where_the_best_lies_at_its_end(minimum, best_lr, tried):
    results, best = searched(lambda network, lr: (
        9 + abs(math.log(lr / 3e-3)) if network == NETWORKS[0] else abs(math.log(lr / minimum))))
    assert (best.network, best.lr) == (NETWORKS[1], best_lr)
    assert sorted(float(name.split("-lr")[1].split("-seed")[0]) for name in results if "DiT2" in name) == tried
    assert len([name for name in results if "DiT1" in name]) == 3  # its best rate is inside: its range does not grow


def test_a_run_that_failed_is_the_worst():
    results, best = searched(lambda network, lr: -lr)  # without an end
    assert best is None
    failing = {name: {"failed": "nan"} if "lr0.006" in name else result(1 - 0.1 * ("lr0.003" in name)) for name in results}
    assert search("digits", "DiT", NETWORKS, failing)[1].lr == 3e-3


def test_seeds_and_curves_follow_the_search_and_a_follower_takes_its_leaders_rate(monkeypatch):
    task = comparison.TASKS["digits"]
    later = task._replace(families=task.families | {"Later": {"L": ("DiNext-U-S", {})}}, follows={"Later": "DiNext"})
    monkeypatch.setitem(comparison.TASKS, "digits", later)
    results = {}
    assert {run.stage for run in plan("digits", results)} == {"search"}
    for _ in range(5):  # the range of rates grows to that of DiNext's best
        results |= {run.name: result(abs(math.log(run.lr / (12e-3 if run.family == "DiNext" else 3e-3))))
                    for run in plan("digits", results) if run.stage == "search"}
    runs = [run for run in plan("digits", results) if run.name not in results]
    families = ["DiT", "DiNext", "DiNext-U", "Later"]
    assert [(run.family, run.seed, run.share) for run in runs] == [
        *((family, seed, 1) for seed in (0, 1, 2) for family in families),
        *((family, 0, Fraction(1, part)) for part in (8, 4, 2) for family in families[:-1])]
    assert {(run.network, run.lr) for run in runs if run.family == "Later"} == {("L", 12e-3)}
    assert len({run.name for run in plan("digits", results)}) == len(plan("digits", results))


def test_each_network_on_trial_runs_whole_and_finalists_get_what_the_chosen_ones_get(monkeypatch):
    """The rate of New is searched with B, its first; that of Given is given."""
    families = {"DiT": ["A"], "New": ["B", "C", "D"], "Given": ["E"]}
    families = {family: {network: ("DiT-S/2", {}) for network in networks} for family, networks in families.items()}
    task = comparison.TASKS["digits"]._replace(
        families=families, trials={"New": (3e-3, 6e-3, 12e-3), "Given": (1e-3,)}, finalists=("C",))
    monkeypatch.setitem(comparison.TASKS, "digits", task)
    results = {}
    for _ in range(5):
        results |= {run.name: result(abs(math.log(run.lr / 3e-3))) for run in plan("digits", results) if run.stage == "search"}
    runs = [run for run in plan("digits", results) if run.stage != "search"]
    assert {run.name for run in plan("digits", results)} - results.keys() == {run.name for run in runs}
    assert {(run.network, run.lr) for run in runs if run.stage == "trial"} == {("B", 3e-3), ("D", 3e-3), ("E", 1e-3)}
    assert [(run.seed, run.share) for run in runs if run.network == "C"] == [
        (run.seed, run.share) for run in runs if run.network == "A"] != []
    assert {(run.seed, run.share) for run in runs if run.stage == "trial"} == {(0, 1)}
    searched = {(run.network, run.lr) for run in plan("digits", results) if run.stage == "search"}
    assert {lr for network, lr in searched if network == "B"} == {1.5e-3, 3e-3, 6e-3, 12e-3}
    assert {network for network, _ in searched} == {"A", "B"}


def test_candidates_are_networks_that_a_checkpoint_can_name(monkeypatch):
    tiny = dict(hidden_size=16, depth=2)
    x, t, y = torch.randn(3, 8, 8, 8), torch.tensor([0.0, 300, 999]), torch.tensor([0, 4, 10])
    assert not set(CANDIDATES) & set(REGISTERED)  # only candidates.py knows them
    for name, network in CANDIDATES.items():
        monkeypatch.setitem(Small_models, name, network)
        model = randomised(ModelSpec.of_preset(name, tiny | dict(input_size=8, in_channels=8, num_classes=10)).build())
        out = model(x, t, y)
        assert out.shape == x.shape
        for other in (model(x, t.flip(0), y), model(x, t, y.flip(0))):
            assert not torch.equal(other[0], out[0])
            assert torch.equal(other[1], out[1])
        assert torch.equal(model.decode(model.encode(x, c := model.condition(t, y), 1), c, 1), out)


def test_each_part_of_convadaln_is_another_network():
    """Without a part it is ConvAdaLN; the modules that stay are the same."""
    weights = randomised(ConvAdaLN(hidden_size=16, depth=1)).state_dict()
    x, c = torch.randn(3, 16, 8, 8).double(), torch.randn(3, 16).double()  # as GroupNorms scale up what rounding does

    def output(part):
        block = randomised(PartsBlock(16, part)).double()
        names = {key: key.replace("modulation.1", "modulation") for key in block.state_dict()}
        same = {key: weights[f"blocks.0.{old}"] for key, old in names.items() if f"blocks.0.{old}" in weights}
        block.load_state_dict({key: value for key, value in same.items() if value.shape == block.state_dict()[key].shape},
                              strict=False)
        return block(x, c)

    plain = ConvAdaLN(hidden_size=16, depth=1)
    plain.load_state_dict(weights)
    expected = plain.double().blocks[0](x, c)
    torch.testing.assert_close(output("none"), expected)
    for part in PARTS:
        assert not torch.allclose(output(part), expected)
    block = randomised(PartsBlock(16, "adaln-zero")).double()
    scale, shift, gate = block.modulation(c)[..., None, None].chunk(3, dim=1)
    h = nn.functional.mish(block.conv(block.norm(x) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, c), x + gate * block.conv0(block.norm0(h)))
    block = randomised(PartsBlock(16, "depthwise")).double()
    scale, shift = block.modulation(c)[..., None, None].chunk(2, dim=1)
    h = nn.functional.conv2d(block.norm(x), block.conv.weight.view(16, 1, 7, 7), block.conv.bias, padding=3, groups=16)
    h = block.norm0(nn.functional.mish(scale * h + shift)).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x, c), x + block.conv0.fc2(nn.functional.gelu(block.conv0.fc1(h))).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="part 'none' must be depthwise"):
        Parts("none")


def test_a_budget_is_a_number_of_steps():
    times = {"mnist16-times": {"networks": {"DiT/2 96x4": {"seconds": 0.21}}}}
    run = Run("mnist16", "search", "DiT", "DiT/2 96x4", 3e-3, 0, Fraction(1, 5))
    assert steps_of(run, times) == 400  # 420 s / 5 / 0.21 s
    with pytest.raises(ValueError, match=r"is not known.*`compare.py time --tasks mnist16`"):
        steps_of(run, {})


def test_a_network_added_later_is_timed_beside_the_others(tmp_path, monkeypatch):
    first = {"DiT/1 40x2": 0.1, "DiT/2 64x4": 0.2, "DiNext/2 64x4": 0.3, "gone": 0.7}
    now = {"DiT/1 40x2": 0.2, "DiT/2 64x4": 0.4, "DiNext/2 64x4": 0.9, "DiNext-U 16": 0.5}  # twice as slow, three times
    stored = {"networks": {name: {"seconds": seconds} for name, seconds in first.items()}, "date": "then"}
    (tmp_path / "digits-times.json").write_text(json.dumps(stored))
    monkeypatch.setattr(compare, "time_networks", lambda *args: {
        name: {"seconds": s, "fastest": s / 2, "slowest": 2 * s} for name, s in now.items()})
    threads = torch.get_num_threads()
    for folder in (tmp_path, tmp_path / "new"):
        compare.main(compare.build_parser().parse_args(["time", "--tasks", "digits", "--results", str(folder)]))
    torch.set_num_threads(threads)
    assert json.loads((tmp_path / "new/digits-times.json").read_text())["networks"]["DiT/1 40x2"]["seconds"] == 0.2
    report = json.loads((tmp_path / "digits-times.json").read_text())
    assert {name: times["seconds"] for name, times in report["networks"].items()} == first | {"DiNext-U 16": 0.25}
    assert [report["networks"]["DiNext-U 16"][key] for key in ("fastest", "slowest", "scale")] == [0.125, 0.5, 0.5]
    assert report["networks"]["DiT/1 40x2"] == {"seconds": 0.1}


def test_table_and_figure(tmp_path):
    task = comparison.TASKS["digits"]
    networks = {name: {"seconds": 0.03, "parameters": 1e6, "macs": 2e9} for family in task.families.values() for name in family}
    results = {"digits-times": {"networks": networks}}
    for _ in range(5):
        for run in plan("digits", results):
            value = 2.0 + run.seed + len(run.family) if run.stage == "main" else abs(math.log(run.lr / 3e-3))
            results.setdefault(run.name, result(value, 2.5 if run.stage == "curve" else 0.5) | {
                "steps": 7, "guided": result(9)["figures"]})
    failed = [name for name in results if "DiNext-U" in name and not name.endswith("5")]  # its runs of 1/8 to the whole
    failed.append(next(name for name in results if "DiNext2" in name and "seed1" in name))
    for name, content in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"failed": "nan", "steps": 7} if name in failed else content))
    comparison.write_report(tmp_path, ["cifar", "digits"])  # a task without results is left out
    table = (tmp_path / "table.md").read_text()
    assert "| DiT/1 40x2 | 1.00 | 2000.0 | 30 | 7 | 14 | 0.003 | 3 | 6 ± 1 | 7 ± 1 | 8 ± 1 |" in table  # of 5, 6, 7 with n - 1
    assert "| DiNext/2 64x4 | 1.00 | 2000.0 | 30 | 7 | 14 | 0.003 | 2 of 3 | 9 ± 1.4 |" in table  # of 8 and 10
    assert "| DiNext-U 16 | 1.00 | 2000.0 | 30 | 7 | 14 | 0.003 | 0 of 3 | failed | failed |" in table
    assert "| real images | - | - | - | - | - | - | - | 0.5 |" in table
    assert "| DiT/2 64x4 | 0.693 | 0 | 0.693 |" in table
    assert "cifar" not in table
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    panel = Figure().subplots()
    comparison.draw_curves(panel, "digits", plan("digits", results), comparison.read_results(tmp_path))
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["real images: 0.5", "DiT/1 40x2", "DiNext/2 64x4"]


def test_wrong_use_is_one_line(tmp_path, run_here):
    times, committed = tmp_path / "digits-times.json", ROOT / "benchmarks/results/compare"
    flags = ["--results", tmp_path, "--work", tmp_path / "work", "--tasks"]
    assert_one_line(run_here(compare, "list", *flags, "digits"), "the step time of DiT/1 40x2 is not known")
    assert_one_line(run_here(compare, "plot", *flags, "cifar", "digits"), f"{tmp_path} has no result of cifar or digits")
    shutil.copy(committed / times.name, times)
    assert_one_line(run_here(compare, "time", *flags, "digits"), "digits-times.json has all networks", "delete it")
    blind = run_here(compare, "run", *flags, "digits", "cifar", "--cifar", tmp_path, "--cifar-features", tmp_path / "none")
    assert_one_line(blind, f"--cifar-features {tmp_path / 'none'} is not a folder")
    assert not (tmp_path / "work").exists()


def call_in_process(command, may_fail=False):
    """What compare.call does, without the seconds in which a process starts."""
    script = importlib.import_module(command[0].removesuffix(".py").replace("/", "."))
    with torch.set_grad_enabled(True):  # restored afterwards: scripts that sample set it
        script.main(script.build_parser().parse_args(command[1:]))


def call_parser(command, may_fail=False):
    """Only the files that compare.py reads, if the script takes the flags."""
    args = importlib.import_module(command[0].removesuffix(".py").replace("/", ".")).build_parser().parse_args(command[1:])
    path, text = {"train.py": lambda: (f"{args.results_dir}/{args.run_name}/metrics.jsonl", '{"loss": 1}'),
                  "sample_ddp.py": lambda: (f"{args.sample_dir}/samples.npz", ""),
                  "evaluate.py": lambda: (args.json, json.dumps(result(0.25))),
                  "benchmarks/classifier.py": lambda: (args.out, "")}[command[0]]()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


@pytest.mark.parametrize("call", [call_parser, pytest.param(call_in_process, marks=pytest.mark.slow)])
def test_a_task_from_time_to_table(call, tmp_path, monkeypatch):
    """One network, three rates, one seed; interrupted once and continued."""
    networks = {"DiNext-U": {"U": ("DiNext-U-S", dict(hidden_size=8, depths=[1, 1, 1, 1, 1]))}}
    task = comparison.TASKS["digits"]._replace(seconds=1, families=networks, seeds=(0,), curve=(),
                                                classifier="--data-path digits --epochs 1")
    monkeypatch.setitem(comparison.TASKS, "digits", task)  # the same dict as compare's
    best = comparison.LRS[1]  # else the range would grow
    monkeypatch.setattr(comparison, "distance", lambda result: abs(result["lr"] - best))
    monkeypatch.setattr(compare, "SAMPLES", dict.fromkeys(compare.SAMPLES, 50))
    monkeypatch.setattr(compare, "ROUNDS", 3)
    calls = []

    def act(what):
        threads = torch.get_num_threads()
        compare.main(compare.build_parser().parse_args(
            [what, "--tasks", "digits", "--results", str(tmp_path), "--work", str(tmp_path / "work")]))
        torch.set_num_threads(threads)

    def interrupted(command, may_fail=False):
        calls.append(command[0])
        if calls.count("sample_ddp.py") == 2:
            raise KeyboardInterrupt
        call(command)

    act("time")
    monkeypatch.setattr(compare, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        act("run")
    assert len(list(tmp_path.glob("*1of5.json"))) == 1
    monkeypatch.setattr(compare, "call", call)
    act("run")
    (main,) = tmp_path.glob("*1of1.json")
    report = json.loads(main.read_text())
    assert 0 < comparison.figure(report, "Label accuracy")["value"]
    assert comparison.figure(report, "FD-classifier", "guided")["value"] > 0
    assert report["steps"] == round(1 / json.loads((tmp_path / "digits-times.json").read_text())["networks"]["U"]["seconds"])
    monkeypatch.setattr(compare, "call", None)  # nothing is called any more
    act("run")
    act("plot")
    assert "\n| U | 0.0" in (tmp_path / "table.md").read_text()


def test_a_script_that_fails_and_one_that_is_still_at_work(monkeypatch):
    """A script that a killed run had called lives on: it is waited for."""
    answers = [subprocess.CompletedProcess([], 2, stderr=f"error: {words}\n") for words in (
        "another process is at work in X; wait for it", "the loss is not finite", "no folder")]
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: answers.pop(0))
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: None)
    assert compare.call(["train.py"], may_fail=True) == "error: the loss is not finite"
    with pytest.raises(SystemExit, match=r"failed:\n.*no folder"):
        compare.call(["train.py"])


def test_failure_of_training_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "call", lambda command, may_fail=False: "error: the loss is not finite" if may_fail else None)
    run = Run("digits", "search", "DiNext-U", "DiNext-U 16", 1.0, 0, Fraction(1, 5))
    args = compare.build_parser().parse_args(["run", "--work", str(tmp_path)])
    report = compare.execute(run, 10, args)
    assert report["failed"] == "error: the loss is not finite"
    assert comparison.distance(report) == math.inf
    assert json.loads(json.dumps(report))["share"] == 0.2


def test_a_timed_step_is_a_whole_one():
    task, network = comparison.TASKS["digits"], compare.build(("DiNext-U-S", dict(hidden_size=8, depths=[1] * 5)), (1, 8, 8))
    torch.nn.init.normal_(network.head.linear.weight)  # else gradients before the last layer are 0
    before = [parameter.clone() for parameter in network.parameters()]
    step = compare.training_step(network, task)
    step()
    step()  # a zero gate moves in the first step, and what stands before it in the second
    moved = [not torch.equal(a, b) for a, b in zip(before, network.parameters())]
    assert all(moved)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_results_are_those_of_the_networks_that_are_named():
    """A network of the list that changes leaves its results behind."""
    results = comparison.read_results(ROOT / "benchmarks/results/compare")
    runs = [result for result in results.values() if "network" in result]
    assert len(runs) > 50
    for result in runs:
        assert json.dumps(result["model_args"]) in result["command"]
        default = {"label_std": 0.02} if result["preset"] in ("DiNext-S/2", "DiNext-U-S") else {}  # until 2026-11-30
        assert (result["preset"], default | result["model_args"]) == (
            comparison.TASKS[result["task"]].families[result["family"]][result["network"]])
    for name in [name for name in comparison.TASKS if f"{name}-times" in results]:
        task = comparison.TASKS[name]
        for family in task.families.values():
            for title, network in family.items():
                trained = sum(p.numel() for p in compare.build(network, task.shape).parameters() if p.requires_grad)
                assert trained == results[f"{name}-times"]["networks"][title]["parameters"], title
