import json

import pytest

import evaluate
import extract_features
import sample
import sample_ddp
import train
from diffusion import create_diffusion
from models import DiNextU
from runtime import cli
from runtime.files import check_writable


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
    (["--lrr", "1"], None, "--lrr 1; did you mean --lr?"),
    ([], "lr: null\n", "--lr: null is not allowed"),
    ([], "run_nme: x\n", "unknown key 'run_nme'; did you mean run_name?"),
    ([], "lr: 1.0\nlr: 2.0\n", "c.yaml: line 1: the key 'lr' stands there twice"),
    ([], "run_name: x\nmodel_args:\n  a: 1\n  a: 2\n", "line 3: the key 'a' stands there twice"),
    ([], "lr:\t1\n\tx: 2\n", "c.yaml, line "),
    ([], "# nothing\n", "c.yaml: expected keys and values"),
    ([], "- lr\n", "c.yaml: expected keys and values"),
    ([], b"\xff\xfel\x00r\x00", "c.yaml is not a text file in UTF-8"),
    (["--config", "."], None, "--config .: Is a directory"),
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
        (tmp_path / "c.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
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
    assert check(create_diffusion, {"objective": "flow"}) == {"objective": "flow"}
    assert check(DiNextU, {"depths": [1, 1, 2, 1, 1], "hidden_size": "8"}) == {
        "depths": (1, 1, 2, 1, 1), "hidden_size": 8}
    with pytest.raises(ValueError, match="unknown key 'objectiv'; allowed: timestep_respacing"):
        check(create_diffusion, {"objectiv": "flow"})
    with pytest.raises(ValueError, match=r"use_kl: Expected a bool\. Got value: perhaps"):
        check(create_diffusion, {"use_kl": "perhaps"})
    with pytest.raises(ValueError, match="unknown key 'in_channels'"):
        check(DiNextU, {"in_channels": 3}, {"in_channels"})


def test_a_library_s_value_error_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x.py"])
    with pytest.raises(json.JSONDecodeError):
        cli.run(lambda args: json.loads("{"), parser())
    with pytest.raises(SystemExit):
        cli.run(lambda args: check_writable("/proc/nowhere"), parser())
    assert "cannot write to the folder /proc/nowhere" in capsys.readouterr().err
