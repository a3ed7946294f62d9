"""What signals, other threads and forks may do in the middle of a call."""

import os
import threading

import numpy as np
import pytest

import qattn
from qattn.cpu.scratch import scratch
from tests.test_kernel import python

SIGNALS = """
import os, signal, threading, time, numpy as np, qattn
from qattn.cpu import kernel
from tests.strategies import random_weights, normal
from tests.test_kernel import meet
w, x, other = random_weights("Q8_0", 64, 64), normal((200, 64)), random_weights("Q8_0", 16, 32)
q, k = normal((30, 2, 16)), normal((90, 2, 16))
calls = [lambda: qattn.matmul(x, w), lambda: np.asarray(other), lambda: qattn.attention(q, k, k, scale=0.5)]
want = [call() for call in calls]
"""


def test_a_handler_may_compute_in_the_middle_of_a_call():
    code = (
        SIGNALS
        + """
busy, count, wrong = False, 0, 0
def handler(*_):
    global busy, count, wrong
    if not busy:
        busy, count = True, count + 1
        wrong += sum(not np.array_equal(call(), each) for call, each in zip(calls, want))
        busy = False
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
end = time.monotonic() + 2
while time.monotonic() < end:
    wrong += sum(not np.array_equal(call(), each) for call, each in zip(calls, want))
signal.setitimer(signal.ITIMER_REAL, 0)
print(count > 9, wrong)
"""
    )
    assert python(code) == "True 0\n"


def test_interrupts_leave_nothing_half_done():
    """Wherever they come, also while helpers are hired: there is help afterwards, and the process ends."""
    code = (
        SIGNALS
        + """
def handler(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, handler)
count, end = 0, time.monotonic() + 3
while time.monotonic() < end:
    if count % 10 == 0:
        kernel._pool._reset()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-3 * np.random.rand(), 0.1)
        while time.monotonic() < end:
            for call in calls:
                call()
    except KeyboardInterrupt:
        count += 1
signal.setitimer(signal.ITIMER_REAL, 0)
time.sleep(0.1)  # for helpers from before resets, which nobody dismisses
got = [call() for call in calls]
arrived, met = np.zeros(1, np.int64), np.zeros(2, np.bool_)
if qattn.get_num_threads() > 1:
    meet(arrived, met, parts=2)
print(count > 9, all(map(np.array_equal, got, want)), met.all() or qattn.get_num_threads() == 1)
"""
    )
    assert python(code) == "True True True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_compiles_what_another_thread_was_compiling():
    code = """
import os, signal, threading, time, numpy as np, qattn
from qattn.cpu.kernel import Kernel
begun, compile = threading.Event(), Kernel._compile
Kernel._compile = lambda *arguments: begun.set() or compile(*arguments)
q = np.ones((4, 1, 16), np.float32)
def attend(step):
    return qattn.attention(q, q, q, mask=qattn.masks.from_function(lambda i, j: (i - j) % step == 0))
thread = threading.Thread(target=attend, args=(3,))
thread.start()
begun.wait()
time.sleep(0.1)
if not os.fork():
    signal.alarm(100)
    attend(2)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert python(code) == "0\n"


def test_memory_is_used_again_only_when_nobody_has_it():
    def address(array):
        return array.__array_interface__["data"][0]

    first = scratch("a test", (3, 5))
    second = scratch("a test", (15,))
    there, other = address(first), address(second)
    del first, second
    third = address(scratch("a test", (2,)))
    assert other != there and address(scratch("a test", (4,))) == third == other


def test_threads_may_share_an_embedding():
    q, lengths = np.ones((4000, 1, 64), np.float32), (1000, 2000, 3000, 4000)
    want = qattn.rope(q, 0, qattn.RotaryEmbedding(64))
    for _ in range(40):
        rope, wrong = qattn.RotaryEmbedding(64), []

        def turn(n, rope=rope, wrong=wrong):
            if not np.array_equal(qattn.rope(q[:n], 0, rope), want[:n]):
                wrong.append(n)

        threads = [threading.Thread(target=turn, args=(n,)) for n in lengths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and np.array_equal(qattn.rope(q, 0, rope), want)
