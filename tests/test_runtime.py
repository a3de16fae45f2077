import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import evaluate
import extract_features
import sample
import sample_ddp
import train
from diffusion import create_diffusion
from models import DiNextU
from runtime import cli
from runtime.files import check_writable
from runtime.log import Log
from runtime.processes import World, fresh_store, start_world
from runtime.randomness import generator


def parser():
    parser = cli.ArgumentParser("A test.")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--run-name", type=str | None)
    parser.add_argument("--model-args", type=dict, default={})
    return parser


@pytest.mark.parametrize("order", [["--config", "c.yaml", "--lr", "3"], ["--lr", "3", "--config", "c.yaml"],
                                   ["--lr=3", "--config=c.yaml"]])
def test_the_command_line_stands_above_the_config_wherever_it_stands(tmp_path, monkeypatch, order):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("lr: 2.0\nrun_name: x\nmodel_args: {depth: 4}\n")
    args = parser().parse_args(order)
    assert (args.lr, args.run_name, args.model_args) == (3.0, "x", {"depth": 4})


def test_a_later_config_stands_above_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("lr: 2.0\nrun_name: a\n")
    (tmp_path / "b.yaml").write_text("lr: 3.0\n")
    args = parser().parse_args(["--config", "a.yaml", "--config", "b.yaml"])
    assert (args.lr, args.run_name) == (3.0, "a")


@pytest.mark.parametrize(("flags", "config", "words"), [
    (["--lr", "fast"], None, "--lr: Expected a float. Got value: fast"),
    (["--lrr", "1"], None, "--lrr"),
    (["--run", "x"], None, "--run"),  # no abbreviations
    ([], "lrr: 1\n", "lrr"),
    ([], "lr: fast\n", "--lr"),
    ([], "lr: [1\n", "config"),
    (["--config", "nowhere.yaml"], None, "nowhere.yaml"),
    (["--model-args.a.b", "3"], None, "--model-args.a.b: a dotted flag changes one entry of a dictionary"),
])
def test_wrong_flags_and_configs_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys, flags, config, words):
    monkeypatch.chdir(tmp_path)
    if config:
        (tmp_path / "c.yaml").write_text(config)
        flags = ["--config", "c.yaml", *flags]
    with pytest.raises(SystemExit) as exit:
        parser().parse_args(flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.count("\n") == 1
    assert words in error


def test_print_config_writes_a_config_that_can_be_read_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--lr", "3", "--print_config"])
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parser().parse_args(["--config", str(tmp_path / "c.yaml")]).lr == 3


@pytest.mark.parametrize("script", [train, sample, sample_ddp, extract_features, evaluate])
def test_print_config_has_every_flag_below_its_help(script, capsys):
    required = {train: ["--data-path", "x"], extract_features: ["--data-path", "x"]}.get(script, [])
    with pytest.raises(SystemExit):
        script.build_parser().parse_args([*required, "--print_config"])
    lines = capsys.readouterr().out.splitlines()
    keys = {line.split(":")[0]: number for number, line in enumerate(lines) if line[0] not in "#- "}
    flags = [action for action in script.build_parser()._actions if action.dest not in ("help", "config", "print_config")]
    assert set(keys) == {action.dest for action in flags}
    assert all(action.help and lines[keys[action.dest] - 1] == f"# {action.help}" for action in flags)


def test_dictionaries_are_checked_against_a_signature():
    check = cli.check_arguments
    assert check(create_diffusion, {"objective": "flow"}, "--diffusion-args") == {"objective": "flow"}
    assert check(DiNextU, {"depths": [1, 1, 2, 1, 1], "hidden_size": "8"}, "--model-args") == {
        "depths": (1, 1, 2, 1, 1), "hidden_size": 8}
    with pytest.raises(ValueError, match="--diffusion-args: unknown key 'objectiv'; allowed: timestep_respacing"):
        check(create_diffusion, {"objectiv": "flow"}, "--diffusion-args")
    with pytest.raises(ValueError, match=r"--diffusion-args: use_kl: Expected a bool\. Got value: perhaps"):
        check(create_diffusion, {"use_kl": "perhaps"}, "--diffusion-args")
    with pytest.raises(ValueError, match="unknown key 'in_channels'"):
        check(DiNextU, {"in_channels": 3}, "--model-args", {"in_channels"})


def test_randomness_is_a_function_of_its_address():
    def draw(*address):
        return torch.randn(4, generator=generator(*address)).tolist()

    assert draw("noise", 0, 17) == draw("noise", 0, 17)
    others = [draw("noise", 0, 17), draw("noise", 0, 18), draw("noise", 1, 17), draw("other", 0, 17), draw("noise", 0, 1, 7)]
    assert len({tuple(values) for values in others}) == 5


def test_a_world_of_one_needs_no_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    world = start_world("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.mean(torch.tensor(3.0)) == 3
    calls = []
    assert world.on_main(lambda: {"a": 1}) == {"a": 1}
    assert world.main_first(lambda: calls.append(1) or 7) == 7
    assert calls == [1]
    with pytest.raises(FileNotFoundError, match="mine"):
        world.on_main(lambda: open("mine"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda: this machine has none; available: cpu"):
            start_world("cuda")


@pytest.mark.parametrize("size", [1, 3])
def test_processes_of_one_start_share_a_part_of_the_store_that_dead_ones_do_not_know(size):
    store = torch.distributed.HashStore()
    store.set("asks/1", "a dead process")
    for _ in range(2):  # a start, and a restart with the first one's answers still there
        with ThreadPoolExecutor(size) as pool:
            parts = list(pool.map(lambda rank: fresh_store(store, rank, size), range(size)))
        assert not parts[0].check(["address"])
        parts[0].set("address", "here")
        assert [part.get("address") for part in parts] == [b"here"] * size


def test_a_library_s_value_error_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x.py"])
    with pytest.raises(json.JSONDecodeError):
        cli.run(lambda args: json.loads("{"), parser())
    with pytest.raises(SystemExit):
        cli.run(lambda args: check_writable("/proc/nowhere"), parser())
    assert "cannot write to the folder /proc/nowhere" in capsys.readouterr().err


def test_the_log_forgets_what_an_interrupted_run_will_do_again(tmp_path):
    world = World(0, 1, torch.device("cpu"))
    log = Log(tmp_path, world, 0, "none", {})
    for step in (1, 2, 3):
        log.record(step, loss=step / 10)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "los')  # killed in the middle of a line
    Log(tmp_path, world, 2, "none", {}).record(3, loss=0.5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.1), (2, 0.2), (3, 0.5)]


def test_other_processes_log_nothing(tmp_path):
    log = Log(tmp_path, World(1, 2, torch.device("cpu")), 0, "none", {})
    log.say("x")
    log.record(1, loss=1)
    log.close()
    assert list(tmp_path.iterdir()) == []
