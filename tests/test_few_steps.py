import json

import pytest
import torch
from conftest import ROOT, assert_one_line
from test_compare import call_in_process, call_parser

from benchmarks import few_steps
from benchmarks.few_steps import EULER, HEUN, MAP, Sampler


def act(what, folder):
    threads = torch.get_num_threads()
    few_steps.main(few_steps.build_parser().parse_args(
        [what, "--tasks", "digits", "--results", str(folder / "results"), "--work", str(folder / "work")]))
    torch.set_num_threads(threads)


def test_calls_of_the_network_are_counted_with_both_branches_of_guidance():
    assert [sampler.calls for sampler in (*EULER, *MAP, *HEUN)] == [1, 2, 4, 8, 1, 2, 4, 8, 3, 7, 49]
    assert Sampler("heun", 25, guided=True).calls == 49 + 2 * 17  # 0.68, 0.64, … 0.04: each is the end and the start of a step
    assert Sampler("heun", 25, guided=True).flags[-5:] == ["--cfg-scale", "2.5", "--guidance-interval", "0", "700"]
    u, v, null = 5.0, 1.4, -1.0
    assert u == pytest.approx(v + few_steps.OMEGA * (u - null))            # what training aims at
    assert u == pytest.approx(null + few_steps.SCALE * (v - null))         # what sampling does


@pytest.mark.parametrize("call", [call_parser, pytest.param(call_in_process, marks=pytest.mark.slow)])
def test_a_task_from_time_to_table(call, tmp_path, monkeypatch):
    """One seed and few steps; interrupted once and continued."""
    monkeypatch.setitem(few_steps.STUDIES, "digits", few_steps.STUDIES["digits"]._replace(seconds=0.2, samples=20))
    for name, value in dict(SEEDS=(0,), ROUNDS=2).items():
        monkeypatch.setattr(few_steps, name, value)
    commands = []

    def interrupted(command):
        commands.append(command)
        if len(commands) == 20:
            raise KeyboardInterrupt
        call(command)

    act("time", tmp_path)
    monkeypatch.setattr(few_steps, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        act("run", tmp_path)
    act("run", tmp_path)
    act("table", tmp_path)
    trained = {command[command.index("--run-name") + 1]: command for command in commands if command[0] == "train.py"}
    assert list(trained) == [f"digits-{stage}-seed0" for stage in ("flow", "longer-flow", "map", "guided-map")]
    steps = {name: int(command[command.index("--max-steps") + 1]) for name, command in trained.items()}
    assert steps["digits-longer-flow-seed0"] in range(2 * steps["digits-flow-seed0"] - 1, 2 * steps["digits-flow-seed0"] + 2)
    assert ["--init-from" in command for command in trained.values()] == [False, False, True, True]
    assert trained["digits-map-seed0"][-1] == str(tmp_path / "work/digits-flow-seed0")
    rows = (tmp_path / "results/table.md").read_text().splitlines()
    assert len(rows) == 4 + sum(map(len, few_steps.STAGES.values())) + 1
    assert rows[-1].startswith("| real images | - | - | - | ")
    count = len(commands)
    act("run", tmp_path)
    assert len(commands) == count  # nothing is missing


def test_wrong_use_is_one_line(tmp_path, run_here):
    flags = ["--results", tmp_path, "--work", tmp_path / "work", "--tasks", "digits"]
    assert_one_line(run_here(few_steps, "run", *flags), "the step times of digits are not known")
    assert_one_line(run_here(few_steps, "table", *flags), f"{tmp_path} has no result of digits")
    (tmp_path / "digits-times.json").write_text("{}")
    assert_one_line(run_here(few_steps, "time", *flags), "digits-times.json exists, and budgets depend on it")


def test_distances_are_also_told_above_the_floor(tmp_path):
    def report(stage, values):
        names = dict.fromkeys(sampler.title for sampler in few_steps.STAGES[stage])
        return {"task": "digits", "stage": stage, "figures": {title: [
            {"name": name, "value": values[name], "floor": floors[name]} for name in few_steps.FIGURES] for title in names}}

    floors = {"FD-classifier": 0.343, "FD-pixel32": 0.353, "Label accuracy": 0.99}

    for stage, above in {"longer flow": 1.0, "map": 1.1}.items():
        values = {"FD-classifier": 0.343 + above, "FD-pixel32": 0.353 + 2 * above, "Label accuracy": 0.5}
        (tmp_path / f"digits-{stage}-seed0.json").write_text(json.dumps(report(stage, values)))
    few_steps.main(few_steps.build_parser().parse_args(["table", "--results", str(tmp_path), "--compared",
                                                        str(ROOT / "benchmarks/results/compare")]))
    table = (tmp_path / "table.md").read_text()
    assert "| map | map 4 | 4 | 1 | 1.44 | 2.55 | 0.5 | 1.1 | 2.2 |" in table
    assert "cifar" not in table


def test_results_are_those_of_the_code():
    reports = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results/flow-map").glob("*-seed*.json")]
    assert reports
    for report in reports:
        assert list(report["figures"]) == [sampler.title for sampler in few_steps.STAGES[report["stage"]]]
        assert report["seconds"] == few_steps.STUDIES[report["task"]].seconds * (1 + (report["stage"] == "longer flow"))
