"""Kernels: parts and threads, recording and replaying, several processes and Python threads at once."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qattn
from qattn.cpu._jit import generated
from qattn.cpu.atomics import add_one, read
from qattn.cpu.feed_forward import add
from qattn.cpu.kernel import Program, _work, kernel, share
from qattn.cpu.pool import CALL, LINE, Pool
from tests.strategies import normal, random_weights

ROOT = Path(__file__).parent.parent


def python(code, **environment):
    command, environment = [sys.executable, "-c", code], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@kernel("test", kept=False)
def count(done, part, parts):
    for i in share(done.size, part, parts):
        done[i] += 1


@kernel("test", kept=False)
def fail(x, part, parts):
    x[0] = 1
    if part == parts - 1:
        raise ValueError


@generated("test")
def tell(x):
    print("told", x[0])
    if x[0] > 5:
        raise ValueError(x[0])


@kernel("test", kept=False)
def tell_all(x, part, parts):
    tell(x)


def test_what_a_part_prints_and_raises(capfd):
    tell_all(np.array([3.5]))
    with pytest.raises(ValueError, match=r"^7\.5$"):
        tell_all(np.array([7.5]))
    assert capfd.readouterr().out == "told 3.5\ntold 7.5\n"


@given(size=st.integers(0, 50), parts=st.integers(1, 70))
def test_parts_share_the_work_and_do_it_once(size, parts):
    done = np.zeros(size, np.int64)
    count(done, parts=parts)
    assert (done == 1).all()


def test_a_replay_does_the_same_to_new_content():
    x, y, program = normal((3, 8)), normal((3, 8), 1), Program()
    with program.recording():
        add(x, y)  # runs as well
        add(x, y, parts=3)
    assert len(program) == 2
    x[...], y[...] = 1, 2
    program.replay()
    assert (x == 5).all()
    add(x, y)
    assert (x == 7).all() and len(program) == 2


def test_a_recording_is_that_of_its_thread():
    x, y, program = np.zeros((1, 8), np.float32), np.ones((1, 8), np.float32), Program()
    with program.recording():
        other = threading.Thread(target=add, args=(x, y))
        other.start()
        other.join()
    assert (x == 1).all() and len(program) == 0


@pytest.mark.parametrize("parts", [2, 5])
def test_a_kernel_that_fails_raises_and_stops_nobody(parts):
    with pytest.raises(ValueError):  # its own error, from whichever thread
        fail(np.zeros(1), parts=parts)
    done = np.zeros(9, np.int64)
    count(done, parts=4)
    assert (done == 1).all()


def test_machine_code_of_other_processes_is_not_confused(tmp_path):
    """Files of the cache written apart, where generated functions have the same numbers, are loaded together."""
    code = (
        "import numpy as np, qattn\n"
        "from tests.strategies import random_weights, normal\n"
        "for name in {!r}:\n"
        "    w, x = random_weights(name, 20, 256), normal((3, 256))\n"
        "    want = x @ np.asarray(w).T\n"
        "    assert np.allclose(qattn.matmul(x, w), want, atol=0.03 * np.abs(want).max()), name\n"
    )
    names = ["Q4_0", "IQ4_NL"]
    for name in names:
        python(code.format([name]), NUMBA_CACHE_DIR=str(tmp_path))
    python(code.format(names), NUMBA_CACHE_DIR=str(tmp_path))


def test_python_threads_may_call_at_once():
    w, x = qattn.PackedMatrix(random_weights("Q4_0", 500, 256)), normal((30, 256))
    want, wrong = qattn.matmul(x, w), []

    def work():
        for _ in range(50):
            if not np.array_equal(qattn.matmul(x, w), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@kernel("test", kept=False)
def meet(arrived, met, part, parts):
    """Whether another thread is in the next part while one waits in this."""
    add_one(arrived)
    looks = 0
    while read(arrived) < 2 and looks < 1 << 31:
        looks += 1
    met[part] = read(arrived) >= 2


@pytest.mark.skipif(qattn.get_num_threads() < 2, reason="there is one thread")
@pytest.mark.parametrize("rest", [0, 0.3])
def test_helpers_come_also_when_they_had_gone_to_sleep(rest):
    for _ in range(2):
        arrived, met = np.zeros(1, np.int64), np.zeros(2, np.bool_)
        meet(arrived, met, parts=2)
        assert met.all()
        time.sleep(rest)


def test_nobody_waits_for_a_helper_that_does_not_come(monkeypatch):
    """As when the system gives its core to another program."""
    pool, nothing = Pool(_work), np.empty((0, CALL), np.int64)
    pool._desks[:, 1] = 1  # there are helpers, for all that is known
    monkeypatch.setattr("qattn.cpu.kernel._pool", pool)
    done = np.zeros(9, np.int64)
    monkeypatch.setattr(qattn.cpu.kernel, "get_num_threads", lambda: 2)
    count(done, parts=4)
    assert (done == 1).all()
    assert pool.run(nothing, np.zeros((1, 3, LINE), np.int64))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_computes_too():
    code = (
        "import os, numpy as np, qattn\n"
        "from tests.strategies import random_weights, normal\n"
        "w, x = random_weights('Q4_0', 500, 256), normal((30, 256))\n"
        "want = qattn.matmul(x, w)\n"
        "if not os.fork():\n"
        "    os._exit(0 if np.array_equal(qattn.matmul(x, w), want) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    assert python(code) == "0\n"


def test_bits_do_not_depend_on_the_number_of_threads():
    w, x, before = random_weights("Q4_K", 700, 512), normal((50, 512)), qattn.get_num_threads()
    q, k = normal((50, 8, 32)), normal((900, 2, 32))
    want = qattn.matmul(x, w), qattn.attention(q, k, k), qattn.attention(q[:1], k, k)
    try:
        for threads in range(1, before + 1):
            qattn.set_num_threads(threads)
            got = qattn.matmul(x, w), qattn.attention(q, k, k), qattn.attention(q[:1], k, k)
            assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    finally:
        qattn.set_num_threads(before)


def test_the_environment_sets_the_number_of_threads():
    code = "import qattn; print(qattn.get_num_threads())"
    assert python(code, QATTN_NUM_THREADS="1") == "1\n"
    with pytest.raises(AssertionError, match="QATTN_NUM_THREADS is 'many'; expected a positive integer"):
        python(code, QATTN_NUM_THREADS="many")
    if hasattr(os, "sched_setaffinity"):
        alone = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + code
        assert python(alone) == "1\n"


MASK = """
import numpy as np, qattn
from qattn import masks
from qattn.cpu import attention
mask, x = masks.from_function(lambda query, key: (query - key) % {} == 0), np.eye(4, 16, dtype=np.float32)[:, None]
assert np.allclose((qattn.attention(x, x, x, mask=mask)[:, 0] > 0)[:, :4], masks.visible(mask, *[np.arange(4)] * 2))
(thunk,) = attention.attend(*[attention.Storage("f32", "f32")] * 2, type(mask)).thunks.values()
print(sum(thunk.stats.cache_hits.values()))
"""


def test_a_mask_of_a_function_is_compiled_once_for_all_processes(tmp_path):
    """It is known by what it does: another that stands in the same place is another."""
    for step, hits in ((2, "0"), (2, "1"), (3, "0")):
        assert python(MASK.format(step), NUMBA_CACHE_DIR=str(tmp_path)).strip() == hits
