import torch
from conftest import read_metrics

from runtime.log import Log
from runtime.processes import World


def test_the_log_forgets_what_an_interrupted_run_will_do_again(tmp_path):
    world = World(0, 1, torch.device("cpu"))
    log = Log(tmp_path, world, 0, "none", {})
    for step in (1, 2, 3):
        log.record(step, loss=step / 10)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "los')  # killed in the middle of a line
    Log(tmp_path, world, 2, "none", {}).record(3, loss=0.5)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.5)]


def test_other_processes_log_nothing(tmp_path):
    log = Log(tmp_path, World(1, 2, torch.device("cpu")), 0, "none", {})
    log.say("x")
    log.record(1, loss=1)
    log.close()
    assert list(tmp_path.iterdir()) == []
