import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script
from foreign import ForeignNet

from runtime import UserError
from runtime.processes import (
    SIGNALS,
    Stopped,
    StopSignal,
    World,
    check_launch,
    distribute,
    fresh_store,
    start_world,
    step_timeout,
)


def test_one_place_sets_tf32():
    flags = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [flag.allow_tf32 for flag in flags]
    try:
        for tf32 in (True, False):
            start_world("cpu", tf32)
            assert [flag.allow_tf32 for flag in flags] == [tf32, tf32]
    finally:
        for flag, value in zip(flags, before):
            flag.allow_tf32 = value
    files = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")] if path.parent.name != "tests"]
    setting = [path.name for path in files if re.search(r"allow_tf32 =|fp32_precision =|set_float32", path.read_text())]
    assert setting == ["processes.py"]


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
        with pytest.raises(ValueError, match=r"`device` cuda .*; available: cpu"):
            start_world("cuda")


def test_processes_ask_for_signals_once_a_second_and_stop_at_the_same_step(monkeypatch):
    """Two processes as threads. Their clocks run at 0.02 and 0.0201 s a step; the second one hears a signal at step 105."""
    clock, meeting, shared, asks = threading.local(), threading.Barrier(2, timeout=30), [None, None], []

    def all_reduce(tensor, op, group):
        shared[group.rank] = tensor.clone()
        meeting.wait()
        tensor.copy_(torch.maximum(*shared))
        meeting.wait()
        asks.append(group.rank)

    def train(rank):
        clock.now, signals[rank].asked = 0.0, 0.0
        for step in range(1, 1000):
            clock.now += (0.02, 0.0201)[rank]
            if (rank, step) == (1, 105):
                signals[rank].name = "SIGTERM"
            try:
                signals[rank].check(paced=True)
                if step == 40:  # as in a preview
                    signals[rank].check()
            except Stopped:
                return step

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    signals = [StopSignal(World(0, 1, torch.device("cpu"))) for _ in range(2)]
    for rank, one in enumerate(signals):
        one.group = SimpleNamespace(rank=rank)
    monkeypatch.setattr("runtime.processes.time", SimpleNamespace(monotonic=lambda: clock.now))
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(train, range(2))) == [120, 120]
    assert len(asks) == 2 * 10  # at steps 1, 3, 7, 15, 31, 40, 60, 80, 100 and 120


def test_what_schedulers_send_before_they_kill_stops_a_run_too():
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
        before = {other: signal.getsignal(other) for other in SIGNALS}
        try:
            stop = StopSignal(World(0, 1, torch.device("cpu")))
            assert signal.getsignal(number) == stop._receive  # else it would end pytest
            signal.raise_signal(number)
            with pytest.raises(Stopped, match=number.name):
                stop.check()
        finally:
            for other, handler in before.items():
                signal.signal(other, handler)


def test_setting_up_ddp_leaves_statistics_as_they_are():
    """Also a BatchNorm over features alone, which refuses a batch of one."""
    class Network(ForeignNet):
        def forward(self, x, t, y):
            return super().forward(x, t, y) + self.norm(self.classes(y)).mean(dim=1)[:, None, None, None]

    network = Network()
    network.norm = torch.nn.BatchNorm1d(8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = distribute(network.train(), World(0, 2, torch.device("cpu")))
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
        wrapped(torch.randn(2, 1, 8, 8), torch.ones(2), torch.ones(2).long())
        assert not torch.equal(network.norm.running_mean, before["norm.running_mean"])
    finally:
        torch.distributed.destroy_process_group()


def test_processes_that_would_not_find_each_other_are_refused(capsys):
    for env, *words in (
            ({"RANK": "1"}, "RANK is set", "WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not", "torchrun"),
            ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "MASTER_PORT is not", "unset RANK and WORLD_SIZE"),
            ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set", "RANK"),
            ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}, "8 tasks of SLURM", "torchrun")):
        with pytest.raises(UserError) as error:
            check_launch(env)
        assert all(word in str(error.value) for word in words), error.value
    assert capsys.readouterr().err == ""
    check_launch({"SLURM_NTASKS": "8"})  # a script of sbatch has it too, and so has salloc's shell
    assert re.fullmatch("If srun started this: 8 tasks .*\n", capsys.readouterr().err)
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1", "SLURM_NTASKS": "2"}
    for env in ({}, whole, {"MASTER_ADDR": "x", "MASTER_PORT": "1"}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2"}):
        check_launch(env)
    assert capsys.readouterr().err == ""


def test_a_timeout_that_is_no_number_of_seconds_is_refused(monkeypatch):
    assert step_timeout().total_seconds() == 1800
    monkeypatch.setenv("DINEXT_TIMEOUT", "90")
    assert step_timeout().total_seconds() == 90
    for given in ("soon", "0", "nan", "-3"):
        monkeypatch.setenv("DINEXT_TIMEOUT", given)
        with pytest.raises(UserError, match=f"DINEXT_TIMEOUT={given} "):
            step_timeout()


def test_on_the_cpu_memory_is_kept_and_denormal_numbers_are_zero_in_all_threads(tmp_path):
    """108 MiB are 27,648 pages, each of which is faulted in once. Without mallopt there are 240,000 faults."""
    faults, denormals = map(int, run_script("tests/other_process.py", "measure_memory", cwd=tmp_path).stdout.split())
    assert faults < 60_000 or sys.platform != "linux"
    assert denormals == 0


def test_processes_of_one_start_share_a_part_of_the_store_that_dead_ones_do_not_know():
    for size in (1, 3):
        store = torch.distributed.HashStore()
        store.set("asks/1", "a dead process")
        for _ in range(2):  # a start, and a restart with the first one's answers still there
            with ThreadPoolExecutor(size) as pool:
                parts = list(pool.map(fresh_store, [store] * size, range(size), [size] * size))
            assert not parts[0].check(["address"])
            parts[0].set("address", "here")
            assert [part.get("address") for part in parts] == [b"here"] * size
