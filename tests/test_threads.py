"""One pool of threads under many callers: Python threads, forks, and any number of workers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import op_calls
from compare import assert_exact
from mxmoe import _core, ops


def results():
    return {name: op_calls.make(name).result() for name in op_calls.NAMES}


def assert_same(got, want):
    for name, expected in want.items():
        for a, b in zip(got[name], expected, strict=True):
            assert_exact(a, b)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_default_is_every_cpu_of_the_process():
    assert _core.current_num_threads() == _core.hardware_threads() >= 1
    if hasattr(os, "sched_getaffinity"):
        assert _core.hardware_threads() == len(os.sched_getaffinity(0))


def test_settings_nest_and_return():
    before = _core.current_num_threads()
    with ops.num_threads(3):
        assert _core.current_num_threads() == 3
        with ops.num_threads(0):
            assert _core.current_num_threads() == _core.hardware_threads()
        with pytest.raises(ZeroDivisionError), ops.num_threads(5):
            raise ZeroDivisionError
        assert _core.current_num_threads() == 3
    assert _core.current_num_threads() == before


def test_a_setting_belongs_to_its_thread():
    seen = []
    with ops.num_threads(7):
        thread = threading.Thread(target=lambda: seen.append(_core.current_num_threads()))
        thread.start()
        thread.join()
    assert seen == [_core.hardware_threads()]


@pytest.mark.parametrize(
    ("n", "error"), [(-1, ValueError), (1025, ValueError), (2.5, TypeError), ("2", TypeError), (10**20, TypeError)]
)
def test_numbers_of_nonsense(n, error):
    before = _core.current_num_threads()
    with pytest.raises(error, match="num_threads"), ops.num_threads(n):
        raise AssertionError("ran with a senseless number of threads")
    assert _core.current_num_threads() == before


@pytest.mark.parametrize("n", [1, 2, 3, 16])
def test_any_number_of_threads_gives_the_same_bits(isa, n):
    with ops.num_threads(1):
        want = results()
    with ops.num_threads(n):
        assert_same(results(), want)


def test_many_callers_at_once():
    with ops.num_threads(1):
        want = results()
    start = threading.Barrier(6)

    def call(caller):
        start.wait()
        for _ in range(5):
            with ops.num_threads(1 + caller % 4):
                assert_same(results(), want)

    with ThreadPoolExecutor(6) as callers:
        for done in [callers.submit(call, i) for i in range(6)]:
            done.result(timeout=120)


def test_callers_may_come_and_go():
    with ops.num_threads(1):
        want = op_calls.make("mxfp4_moe_int8").result()
    failures = []

    def call():
        try:
            with ops.num_threads(3):
                assert_exact(op_calls.make("mxfp4_moe_int8").result()[0], want[0])
        except BaseException as error:
            failures.append(error)

    for _ in range(40):
        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
    assert not failures, failures[0]


FORKS = """
import os, threading
import numpy as np
from mxmoe import ops

x, weight = np.random.default_rng(0).standard_normal((200, 64), np.float32), np.ones(64, np.float32)
with ops.num_threads(3):
    want = ops.rmsnorm(x, weight).tobytes()

stop = threading.Event()
def keep_busy():
    with ops.num_threads(3):
        while not stop.is_set():
            ops.rmsnorm(x, weight)
busy = threading.Thread(target=keep_busy)
if {busy}:
    busy.start()

def child():
    with ops.num_threads(3):
        same = all(ops.rmsnorm(x, weight).tobytes() == want for _ in range(20))
    if not same:
        return 1
    pid = os.fork()
    if pid == 0:
        with ops.num_threads(2):
            os._exit(0 if ops.rmsnorm(x, weight).tobytes() == want else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for _ in range(10):
    pid = os.fork()
    if pid == 0:
        os._exit(child())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
stop.set()
with ops.num_threads(3):
    assert ops.rmsnorm(x, weight).tobytes() == want
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("busy", [False, True])
def test_forked_children_work_on_threads_of_their_own(busy):
    done = run_python(FORKS.replace("{busy}", str(busy)))
    assert done.stdout.split() == ["done"], done.stderr


PINNED = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from mxmoe import _core
print(_core.hardware_threads(), _core.current_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin processes")
def test_a_process_on_one_cpu_uses_one_thread():
    done = run_python(PINNED)
    assert done.stdout.split() == ["1", "1"], done.stderr


def test_a_process_ends_while_workers_wait():
    done = run_python(
        "import numpy as np; from mxmoe import ops\n"
        "with ops.num_threads(4): ops.rmsnorm(np.ones((50, 8), np.float32), np.ones(8, np.float32))\n"
        "print('done')"
    )
    assert (done.returncode, done.stdout.split()) == (0, ["done"]), done.stderr
