import json
import os
import sys

import jsonargparse
import pytest

import evaluate
import extract_features
import sample
import sample_ddp
import train
from diffusion import create_diffusion
from models import DiNextU
from runtime import UserError, cli
from runtime.files import check_writable


def parser():
    parser = cli.ArgumentParser("A test.")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--run-name", type=str | None)
    parser.add_argument("--model-args", type=dict, default={})
    return parser


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    """a.yaml and b.yaml, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("lr: 2.0\nrun_name: a\nmodel_args: {depth: 4}\n")
    (tmp_path / "b.yaml").write_text("lr: 3.0\n")
    return tmp_path


@pytest.fixture
def error(capsys):
    """Parse wrong flags; the one line that says so."""
    def error(*flags, parser=parser):
        with pytest.raises(SystemExit) as exit:
            parser().parse_args(list(flags))
        printed = capsys.readouterr().err
        assert exit.value.code == 2
        assert printed.count("\n") == 1
        return printed
    return error


def test_flags_override_configs_in_any_order_and_a_later_config_an_earlier_one():
    for flags in ("--config a.yaml --lr 5", "--lr 5 --config a.yaml", "--lr=5 --config=a.yaml",
                  "--config a.yaml --lr 5 --config b.yaml"):
        args = parser().parse_args(flags.split())
        assert (args.lr, args.run_name, args.model_args) == (5.0, "a", {"depth": 4})
    assert parser().parse_args("--config a.yaml --config b.yaml".split()).lr == 3.0
    args = parser().parse_args("--model-args.width 8 --config a.yaml".split())
    assert args.model_args == {"depth": 4, "width": "8"}


def test_a_wrong_flag_is_one_line_and_exit_2(error):
    for flags, *words in (
            ("--lr fast", "lr", "float", "fast"), ("--lrr 1", "--lrr 1; did you mean --lr?"), ("--run x", "--run"),
            ("--config nowhere.yaml", "nowhere.yaml"), ("--config .", "not a file"),
            ("--model-args.a.b 3", "--model-args.a.b", "one entry of a dictionary")):
        found = error(*flags.split())
        assert all(word in found for word in words), found


def test_a_wrong_config_is_one_line_and_exit_2(configs, error):
    for content, *words in (
            ("lr: null\n", "--lr: null"), ("run_nme: x\n", "'run_nme' in c.yaml; did you mean run_name?"),
            ("lr: fast\n", "lr", "fast"),
            ("run_name: x\nmodel_args:\n  a: 1\n  a: 2\n", "duplicate key 'a' in c.yaml, line 4"),
            ("lr:\t1\n\tx: 2\n", '"c.yaml", line 1'), ("# nothing\n", "c.yaml has no keys"), ("- lr\n", "c.yaml has no keys"),
            (b"\xff\xfel\x00r\x00", "UTF-8")):
        (configs / "c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        found = error("--config", "c.yaml")
        assert all(word in found for word in words), found


def test_values_of_configs_are_those_that_jsonargparse_reads():
    for value in ("1e4 1e-4 1.5e4 1.e5 -1.5e+30 -3E+2 .5 5. .5e-3 1e4a 1e 1.0.0 1_000 0x1f 012 1:30 inf .inf -.INF 2026-01-01 "
                  "2026-01-01T10:00:00Z true no null ~ '1e4' '' [1,2e3] {a:1e3}".split()):
        text = f"a: {value}\nb: 1"
        assert repr(cli.load_yaml(text, "c.yaml")) == repr(jsonargparse.get_loader("yaml")(text)), value


def test_a_value_outside_a_registry_is_answered_with_the_nearest_names(configs, error, capsys, monkeypatch):
    (configs / "c.yaml").write_text("model: DiNext-U-XS\n")
    for build_parser, flags in ((train.build_parser, ["--data-path", "digits"]), (sample.build_parser, [])):
        assert "--model DiT-XL2 is unknown; did you mean DiT-XL/2, " in error(*flags, "--model", "DiT-XL2", parser=build_parser)
        assert "did you mean DiNext-U-S, " in error(*flags, "--config", "c.yaml", parser=build_parser)
        assert error(*flags, "--model", "x", parser=build_parser).count(",") == 2  # three names
        with pytest.raises(SystemExit):
            build_parser().parse_args(["--help"])
        assert "DiNext-U-XL" not in capsys.readouterr().out
    monkeypatch.setitem(train.NETWORKS, "Mine", None)
    assert train.build_parser().parse_args(["--data-path", "digits", "--model", "Mine"]).model == "Mine"


def test_an_error_says_which_config_a_value_comes_from(configs, call_here):
    """The first flag that it names, unless the command line gives it; only `--model-args X`, not `--model-args.x`, does."""
    def fail(args):
        if args.run_name == "unknown":
            raise UserError("`model_args`: unknown key 'depth'; did you mean width?")
        raise UserError("`lr` 2.0 is too large for `run_name` a")

    for flags, end in (("--config a.yaml", "run-name a. --lr comes from a.yaml\n"),
                       ("--config a.yaml --config b.yaml", ". --lr comes from b.yaml\n"),
                       ("--config a.yaml --lr 2", "run-name a\n"), ("--config a.yaml --lr=2", "run-name a\n"),
                       ("--lr 2", "run-name a\n"),
                       ("--config a.yaml --run-name unknown --model-args.width 3",
                        "did you mean width? 'depth' comes from a.yaml; pass --model-args '{}'\n"),
                       ("--config a.yaml --run-name unknown --model-args.depth 3", "did you mean width?\n"),
                       ("--config a.yaml --run-name unknown --model-args {}", "did you mean width?\n")):
        assert call_here(lambda: cli.run(fail, parser()), "x.py", *flags.split()).stderr.endswith(end), flags


def test_print_config_has_every_flag_below_its_help_and_can_be_read_back(configs, capsys):
    for script in (train, sample, sample_ddp, extract_features, evaluate):
        required = {train: ["--data-path", "x"], extract_features: ["--data-path", "x", "--features-path", "y"]}.get(script, [])
        with pytest.raises(SystemExit):
            script.build_parser().parse_args([*required, "--device", "cpu", "--print_config"])
        printed = capsys.readouterr().out
        lines = printed.splitlines()
        keys = {line.split(":")[0]: number for number, line in enumerate(lines) if line[0] not in "#- "}
        flags = script.build_parser().flags
        flags = {name: flag for name, flag in flags.items() if name not in ("help", "config", "print_config")}
        assert set(keys) == set(flags)
        assert all(flag.help and lines[keys[name] - 1] == f"# {flag.help}" for name, flag in flags.items())
        (configs / "c.yaml").write_text(printed)
        if script is not evaluate:  # which has a positional argument
            again = script.build_parser().parse_args(["--config", "c.yaml"]).as_dict()
            assert again | {"config": None} == script.build_parser().parse_args([*required, "--device", "cpu"]).as_dict()


def test_dictionaries_are_checked_against_a_signature():
    check = cli.check_arguments
    assert check(create_diffusion, {"objective": "flow"}) == {"objective": "flow"}
    assert check(DiNextU, {"depths": [1, 1, 2, 1, 1], "hidden_size": "8"}) == {
        "depths": (1, 1, 2, 1, 1), "hidden_size": 8}
    with pytest.raises(ValueError, match=r"'objectiv'; allowed: timestep_respacing.*did you mean objective\?"):
        check(create_diffusion, {"objectiv": "flow"})
    with pytest.raises(ValueError, match=r"use_kl.*bool.*perhaps"):
        check(create_diffusion, {"use_kl": "perhaps"})
    with pytest.raises(ValueError, match="unknown key 'in_channels'"):
        check(DiNextU, {"in_channels": 3}, {"in_channels"})


def test_only_errors_that_a_user_can_fix_lose_their_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x.py"])
    with pytest.raises(json.JSONDecodeError):
        cli.run(lambda args: json.loads("{"), parser())

    def printed(main):
        return failed(main, capsys)

    assert printed(lambda args: check_writable("/proc/nowhere")).startswith("x.py: error: cannot write to the folder /proc/now")
    assert printed(lambda args: raise_(OSError(5, "Input/output error"))) == "x.py: error: [Errno 5] Input/output error\n"
    bug = printed(lambda args: open("nowhere/of_ours"))
    assert "Traceback" in bug
    assert bug.endswith("x.py: error: [Errno 2] No such file or directory: 'nowhere/of_ours'\n")


def failed(main, capsys):
    """What a script prints that ends with exit code 2."""
    with pytest.raises(SystemExit) as exit:
        cli.run(main, parser())
    assert exit.value.code == 2
    return capsys.readouterr().err


def raise_(error):
    raise error


def test_a_process_that_is_alone_prints_its_error_whatever_local_rank_another_program_left(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("RANK", raising=False)
    assert failed(lambda args: raise_(UserError("no")), capsys) == "x.py: error: no\n"
    monkeypatch.setenv("RANK", "1")
    assert failed(lambda args: raise_(UserError("no")), capsys) == ""


def test_only_the_loss_of_another_process_is_called_so(monkeypatch, capsys):
    for owner, name, value in ((sys, "argv", ["x.py"]), (os, "_exit", sys.exit), (cli, "first_to_fail", lambda: True),
                               (cli.dist, "is_initialized", lambda: True)):
        monkeypatch.setattr(owner, name, value)
    for message, lost in (
            ("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711", True),
            ("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete", True),
            ("[c10d] recvValue failed: Connection reset by peer. This may indicate a network failure", True),
            ("NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error", True),
            ("NCCL error in: NCCLUtils.cpp:110, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\n"
             "Last error:\nCuda failure 2 'out of memory'", False),
            ("[enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4", False)):
        printed = failed(lambda args, message=message: raise_(RuntimeError(message)), capsys)
        assert ("lost another process" in printed) == lost
        assert ("Traceback" in printed) != lost
        assert printed.splitlines()[-1].startswith("x.py: error: ")
