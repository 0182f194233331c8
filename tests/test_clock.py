"""Every moment belongs to the innermost part that is marked, and nobody is disturbed by the marks."""

from __future__ import annotations

import mmap
import threading

import torch

from opd_bench import clock
from opd_bench.clock import Clock


class Machine:
    """A clock to be set by hand, and a memory that a part fills and frees."""

    def __init__(self) -> None:
        self.time, self.bytes, self.most = 0.0, 100, 100

    def work(self, seconds: float, takes: int = 0) -> None:
        self.time += seconds
        self.most = max(self.most, self.bytes + takes)

    def now(self) -> int:
        return self.bytes

    def peak(self) -> int:
        most, self.most = self.most, self.bytes
        return most


def heard_on(machine: Machine) -> Clock:
    return Clock(machine, now=lambda: machine.time)


def test_time_within_an_inner_part_is_not_the_outer_ones():
    machine = Machine()
    heard = heard_on(machine)
    with heard.part("update", owner=False):
        machine.work(1, takes=50)
        for _ in range(2):
            with heard.part("teacher", owner=False):
                machine.work(2, takes=700)
        machine.work(4)
    machine.work(8)  # nobody's
    found = heard.take()
    assert {name: (of.calls, of.seconds) for name, of in found.items()} == {"update": (1, 5.0), "teacher": (2, 4.0)}
    assert {name: (of.peak, of.growth) for name, of in found.items()} == {"update": (150, 50), "teacher": (800, 700)}
    assert heard.take() == {}


def test_parts_within_an_owner_are_its_own_even_after_a_failure():
    machine = Machine()
    heard = heard_on(machine)
    try:
        with heard.part("judge", owner=True), heard.part("decode", owner=False):
            machine.work(1)
            raise ArithmeticError
    except ArithmeticError:
        pass
    with heard.part("decode", owner=False):
        machine.work(2)
    assert {name: of.seconds for name, of in heard.take().items()} == {"judge": 0.0, "judge, decode": 1.0, "decode": 2.0}


def test_only_the_thread_that_listens_is_heard_and_only_while_it_does():
    def mark() -> None:
        with clock.part("elsewhere"):
            pass

    with clock.part("before"):
        pass
    with clock.recording() as heard:
        thread = threading.Thread(target=mark)
        thread.start()
        thread.join()
        with clock.part("here"), clock.part("not now", when=False):
            pass
    with clock.part("after"):
        pass
    assert list(heard.take()) == ["here"]


def test_memory_of_a_part_is_the_most_it_had_even_if_it_freed_that():
    with clock.recording() as heard, clock.part("large"), mmap.mmap(-1, 2**26) as block:  # the allocator may have some to spare
        bytes_ = torch.frombuffer(block, dtype=torch.uint8)
        for value in range(20):  # time for a look at the memory
            bytes_.fill_(value)
        del bytes_
    found = heard.take()["large"]
    assert 2**25 < found.growth <= found.peak
