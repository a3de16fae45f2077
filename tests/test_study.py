import json
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line
from test_compare import call_in_process, call_parser

from benchmarks import study
from benchmarks.study import EULER, HEADS, HEUN, MAP, MAPS, OMEGA, SCALE, Sampler, Stage, Study

FLAGS = dict(hidden_size=8, depths=[1, 1, 1, 1, 1])
TINY = {  # of each study: one part, one seed, few steps
    "flow-map": Study("digits", "U", 0.2, 1e-3, 20, MAPS, {"time_scale": 0.01}, seeds=(0,)),
    "heads": Study("digits", "U", 0.2, 1e-3, 20, HEADS, seeds=(0,), judge="--seed 1 --width 8")}


@pytest.fixture
def tiny(monkeypatch):
    task = study.TASKS["digits"]
    task = task._replace(families={"U": {"U": ("DiNext-U-S", FLAGS)}}, classifier="--data-path digits --epochs 1")
    monkeypatch.setitem(study.TASKS, "digits", task)
    monkeypatch.setattr(study, "STUDIES", {name: {"tiny": tiny} for name, tiny in TINY.items()})
    for name, value in dict(ROUNDS=1, TIMED=4).items():
        monkeypatch.setattr(study, name, value)


def act(what, name, folder):
    study.main(study.build_parser().parse_args(
        [what, name, "--results", str(folder / "results"), "--work", str(folder / "work")]))


def test_calls_of_the_networks_are_counted_with_both_branches_of_guidance():
    assert [sampler.calls for sampler in (*EULER, *MAP, *HEUN)] == [1, 2, 4, 8, 1, 2, 4, 8, 3, 7, 49]
    guided = MAPS["longer flow"].samplers[-1]
    assert guided.calls == 49 + 2 * 17  # 0.68, 0.64, … 0.04: each is the end and the start of a step
    assert guided.flags(None, 9)[-5:] == ["--cfg-scale", "2.5", "--guidance-interval", "0", "700"]
    assert [sampler.calls for sampler in HEADS["plain"].samplers] == [25, 50, 50]
    assert [sampler.calls for sampler in HEADS["internal"].samplers] == [25] * 5  # one pass a step
    u, v, null = 5.0, 1.4, -1.0
    assert u == pytest.approx(v + OMEGA * (u - null))    # what training aims at
    assert u == pytest.approx(null + SCALE * (v - null))  # what sampling does


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("call", [call_parser, pytest.param(call_in_process, marks=pytest.mark.slow)])
def test_a_study_from_time_to_table(call, name, tiny, tmp_path, monkeypatch):
    """Interrupted once and continued."""
    commands = []

    def interrupted(command):
        commands.append(command)
        if len(commands) == 18:
            raise KeyboardInterrupt
        call(command)
        if call is call_parser and command[0] == "train.py":
            folder = tmp_path / "work" / command[command.index("--run-name") + 1]
            (folder / "metrics.jsonl").write_text('{"images_per_second": 1280, "loss": 1}')

    monkeypatch.setattr(study, "call", interrupted)
    act("time", name, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        act("run", name, tmp_path)
    act("run", name, tmp_path)
    act("table", name, tmp_path)
    stages = TINY[name].stages
    trained = {command[command.index("--run-name") + 1]: command for command in commands if command[0] == "train.py"}
    runs = [run for run in trained if not run.startswith("time-")]
    assert sorted(runs) == sorted(f"tiny-{stage.replace(' ', '-')}-seed0" for stage in stages)
    assert len(trained) - len(runs) == 3  # steps that are the same are timed once
    for stage, what in stages.items():
        run = trained[f"tiny-{stage.replace(' ', '-')}-seed0"]
        assert ("--init-from" in run) == bool(what.begins)
        assert json.loads(run[run.index("--heads") + 1]).keys() == (what.heads or {}).keys()
    rows = (tmp_path / "results/table.md").read_text().splitlines()
    assert len(rows) == 4 + sum(len(what.samplers) for what in stages.values()) + 1
    assert rows[-1].startswith("| real images | - | - | - | ")
    if name == "heads":
        (guide,) = {command[command.index("--guide-ckpt") + 1] for command in commands if "--guide-ckpt" in command}
        steps = json.loads((tmp_path / "results/tiny-plain-seed0.json").read_text())["steps"]
        assert guide == str(tmp_path / f"work/tiny-plain-seed0/checkpoints/{max(1, steps // 4):07d}.pt")
        judges = {command[command.index("--classifier") + 1] for command in commands if command[0] == "evaluate.py"}
        assert judges == {str(tmp_path / "results/classifier-digits-judge.pt")}  # not the one that was aligned to
    count = len(commands)
    act("run", name, tmp_path)
    assert len(commands) == count  # nothing is missing


def test_only_what_aligns_reads_pictures_and_its_encoder_is_committed():
    args = study.build_parser().parse_args(["run", "heads", "--compared", str(ROOT / "benchmarks/results/compare")])
    for part, of in study.STUDIES["heads"].items():
        for stage in of.stages:
            flags = study.train_flags(part, stage, 0, 10, args)
            heads = json.loads(flags[flags.index("--heads") + 1])
            assert ("data/cifar10-jpg/train" in flags) == (of.task == "cifar" and stage == "align")
            for name in heads.keys() & {"align"}:
                assert Path(heads[name]["encoder"].removeprefix("classifier:")).is_file()


def test_a_stage_may_change_the_network():
    args = study.build_parser().parse_args(["run", "labels"])
    for part in study.STUDIES["labels"]:
        flags = [study.train_flags(part, stage, 0, 10, args) for stage in study.LABELS]
        stds = [json.loads(command[command.index("--model-args") + 1])["label_std"] for command in flags]
        assert stds == [0.02, 1.0]
        assert len({stage for stage in study.LABELS if study.timed_as(study.LABELS, stage) == stage}) == 1


def test_a_budget_is_a_number_of_steps(tiny, tmp_path):
    (tmp_path / "results").mkdir()
    times = {"seconds": {"flow": 0.01, "map": 0.02, "guided map": 0.05}}
    (tmp_path / "results/tiny-times.json").write_text(json.dumps(times))
    args = study.build_parser().parse_args(["run", "flow-map", "--results", str(tmp_path / "results")])
    assert [study.steps_of("tiny", stage, args) for stage in MAPS] == [20, 40, 10, 4]


def test_wrong_use_is_one_line(tiny, tmp_path, run_here):
    flags = ["flow-map", "--results", tmp_path, "--work", tmp_path / "work"]
    assert_one_line(run_here(study, "run", *flags), "the step times of tiny are not known; first run `study.py time flow-map")
    assert_one_line(run_here(study, "table", *flags), f"{tmp_path} has no results of flow-map")
    assert_one_line(run_here(study, "table", *flags, "--parts", "[big]"), "--parts 'big' is unknown; allowed: tiny")
    (tmp_path / "tiny-times.json").write_text("{}")
    assert_one_line(run_here(study, "time", *flags), "tiny-times.json exists, and budgets depend on it")


def test_distances_are_also_told_above_the_floor(tmp_path, monkeypatch):
    stages = {"one": Stage([Sampler("euler", 1)]), "two": Stage([Sampler("map", 4)])}
    monkeypatch.setattr(study, "STUDIES", {"s": {"p": Study("digits", "U", 1, 1, 1, stages)}})
    for stage, above in {"one": 1.0, "two": 1.1}.items():
        figures = [{"name": name, "value": floor + weight * above, "floor": floor} for name, floor, weight in zip(
            study.FIGURES, (0.343, 0.353, 0.99), (1, 2, 0))]
        report = {"part": "p", "stage": stage, "figures": {stages[stage].samplers[0].title: figures}}
        (tmp_path / f"p-{stage}-seed0.json").write_text(json.dumps(report))
    study.main(study.build_parser().parse_args(["table", "s", "--results", str(tmp_path)]))
    table = (tmp_path / "table.md").read_text()
    assert "| two | map 4 | 4 | 1 | 1.44 | 2.55 | 0.99 | 1.1 | 2.2 |" in table
    assert "| real images | - | - | - | 0.343 | 0.353 | 0.99 | 0 | 0 |" in table


def test_a_process_does_not_wait_for_the_classifier_of_another(tiny, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/tiny-times.json").write_text('{"seconds": {"plain": 1, "internal": 1, "align": 1}}')
    for module in (study, study.compare):
        monkeypatch.setattr(module, "claim", lambda folder: "classifier" not in folder.name)
    monkeypatch.setattr(study.compare.time, "sleep", None)  # would fail
    monkeypatch.setattr(study, "execute", None)             # likewise: it needs the classifier
    act("run", "heads", tmp_path)


def test_no_seed_chooses_its_own_scale():
    what = Stage([Sampler("euler", 25), *(Sampler("euler", 25, internal=scale) for scale in (2, 3))])
    distances = {"euler 25": (0, 0, 0), "euler 25, internal 2": (1, 2, 9), "euler 25, internal 3": (5, 6, 3)}
    reports = [{"figures": {title: [{"name": name, "value": values[seed]} for name in study.FIGURES]
                            for title, values in distances.items()}} for seed in range(3)]
    *samplers, (title, calls, chosen) = study.ways_of(what, reports)
    assert [title for title, *_ in samplers] == list(distances)
    assert ("next seed" in title, calls) == (True, 25)
    assert [first for first, *_ in chosen] == [1, 6, 9]  # seed 1 prefers 2, seed 2 prefers 3, seed 0 prefers 2
    assert len(list(study.ways_of(what, reports[:1]))) == 3


def test_results_are_those_of_the_code():
    found = 0
    for name, parts in study.STUDIES.items():
        for path in (ROOT / "benchmarks/results" / name).glob("*-seed*.json"):
            report, found = json.loads(path.read_text()), found + 1
            stage = parts[report["part"]].stages[report["stage"]]
            assert list(report["figures"]) == [sampler.title for sampler in stage.samplers]
            assert report["seconds"] == parts[report["part"]].seconds * stage.time
    assert found
