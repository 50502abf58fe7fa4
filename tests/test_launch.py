"""Processes that a launcher started find each other, or say that they cannot."""

from types import SimpleNamespace

import pytest

from covo_rl.config import ConfigError
from covo_rl.train import launch


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launch.launched_processes() == 1 and not launch.on_cpus()


@pytest.mark.parametrize(("device", "expected"), [(None, True), ("mps", True), ("cuda", False)])
def test_ranks_without_devices_to_share_out_run_on_cpus(monkeypatch, device, expected):
    monkeypatch.setenv("WORLD_SIZE", "2")
    present = device and launch.torch.device(device)
    monkeypatch.setattr(launch.torch.accelerator, "current_accelerator", lambda check_available: present)
    assert launch.on_cpus() is expected


def test_ranks_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    with pytest.raises(ConfigError, match="2 processes were started but each sees 1: they would all write the same"):
        launch.process_state()
    monkeypatch.setattr(launch, "PartialState", lambda cpu: SimpleNamespace(num_processes=2))
    assert launch.process_state().num_processes == 2


def test_more_processes_than_devices_are_refused_before_the_driver_does(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    present = launch.torch.device("cuda")
    monkeypatch.setattr(launch.torch.accelerator, "current_accelerator", lambda check_available: present)
    monkeypatch.setattr(launch.torch.accelerator, "device_count", lambda: 1)
    for start in (launch.process_state, launch.join):
        with pytest.raises(ConfigError, match=r"2 processes were started on a machine with 1 device\(s\)"):
            start()
    monkeypatch.setattr(launch, "PartialState", lambda cpu: SimpleNamespace(num_processes=2))
    monkeypatch.setenv("LOCAL_RANK", "0")  # two machines, and nothing says how many processes run on this one
    assert launch.process_state().num_processes == 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match=r"2 processes were started on a machine with 1 device\(s\)"):
        launch.process_state()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # two machines with one device each
    assert launch.process_state().num_processes == 2
