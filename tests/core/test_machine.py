"""How many threads 0 means: one number for engines, pooling and what is written down."""

import threading

import numpy as np
import pytest

from qat.core import machine
from qat.engine import Options
from qat.families.bevfusion.pooling import _kernel as _pooling_kernel


@pytest.fixture
def two_cores_of_two(monkeypatch):
    """A machine of four processors, 0 and 2 on one core and 1 and 3 on another."""
    read = machine.read_text
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {3, 2, 1, 0}, raising=False)
    siblings = {n: f"{n % 2},{n % 2 + 2}" for n in range(4)}
    files = {f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": text for n, text in siblings.items()}
    monkeypatch.setattr(machine, "read_text", lambda path: files.get(str(path)) or read(path))
    machine._first_of_each.cache_clear()
    yield
    machine._first_of_each.cache_clear()


@pytest.mark.usefixtures("two_cores_of_two")
def test_hyper_threads_are_not_cores_anywhere(monkeypatch):
    assert machine.cores() == [0, 1]
    facts = machine.machine_facts(0)
    assert (facts["cores"], facts["threads"]) == (2, 2)
    assert machine.machine_facts(3)["threads"] == machine.threads_of(3) == 3

    started = []

    class Counted(threading.Thread):
        def start(self):
            started.append(self)
            super().start()

    monkeypatch.setattr(_pooling_kernel.threading, "Thread", Counted)
    out = _pooling_kernel.empty_grid((1, 16, 256, 256))
    none = np.zeros(0, np.int32)
    row_ptr = np.zeros(256 * 256 + 1, np.int32)
    _pooling_kernel.pool_cells(row_ptr, none, none, np.zeros(1, np.float32), np.zeros((1, 16), np.float32), out, 0)
    assert len(started) == 1  # beside the caller
    assert not out.any()

    from qat.engine.onnxruntime_backend import session_options

    assert session_options(Options()).intra_op_num_threads == 2


def test_where_linux_does_not_tell_every_processor_is_a_core(monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {4, 7}, raising=False)
    monkeypatch.setattr(machine, "read_text", lambda path: "")
    machine._first_of_each.cache_clear()
    assert machine.cores() == [4, 7]
    machine._first_of_each.cache_clear()
