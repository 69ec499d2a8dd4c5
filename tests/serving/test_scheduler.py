"""serving/scheduler.py: a bounded queue, work between steps, and an end that finishes what was begun."""

import threading
import time

import pytest

from hypernet.serving.engine import Delta, Generation, Sampling
from hypernet.serving.scheduler import QueueFull, Scheduler, Stopping


class SlowEngine:
    """Stands in for the model: each sequence takes `max_new_tokens` steps of a millisecond."""

    def __init__(self, *, max_batch: int = 2) -> None:
        self.running: list[Generation] = []
        self.max_batch, self.fails = max_batch, False

    @property
    def room(self) -> int:
        return self.max_batch - len(self.running)

    def admit(self, arrivals):
        for one in arrivals:
            if one.prompt == [13]:
                raise RuntimeError("unreadable prompt")
            self.running.append(one)

    def step(self):
        time.sleep(0.001)
        if self.fails:
            self.fails = False
            raise RuntimeError("a broken step")
        self.running = [one for one in self.running if not one.cancelled]
        for one in list(self.running):
            one.ids.append(0)
            if len(one.ids) >= one.sampling.max_new_tokens:
                one.emit(Delta("done", (), "length"))
                self.running.remove(one)

    def clear(self):
        dropped, self.running = self.running, []
        return dropped


def generation(deltas: list[Delta], *, tokens: int = 3, prompt: list[int] | None = None) -> Generation:
    return Generation(prompt=prompt or [1], sampling=Sampling(max_new_tokens=tokens), emit=deltas.append)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def scheduler():
    found = Scheduler(SlowEngine(), max_queue=3)
    yield found
    found.stop(drain_s=0.1)


def test_sequences_beyond_the_batch_wait_and_end(scheduler):
    deltas: list[Delta] = []
    for _ in range(3):
        scheduler.submit(generation(deltas))
    wait_for(lambda: len(deltas) == 3)


def test_full_queue_refuses_until_there_is_room(scheduler):
    gate = threading.Event()
    scheduler.call(gate.wait)
    wait_for(lambda: scheduler.num_waiting == 0)
    deltas: list[Delta] = []
    for _ in range(3):
        scheduler.submit(generation(deltas))
    with pytest.raises(QueueFull, match="3 requests wait already"):
        scheduler.submit(generation(deltas))
    with pytest.raises(QueueFull):
        scheduler.call(gate.wait)
    gate.set()
    wait_for(lambda: len(deltas) == 3)
    scheduler.submit(generation(deltas))


def test_work_runs_while_sequences_run(scheduler):
    deltas: list[Delta] = []
    scheduler.submit(generation(deltas, tokens=5000))
    wait_for(lambda: scheduler.num_running == 1)
    assert scheduler.call(lambda: threading.current_thread().name).result(5) == "model"
    assert not deltas


def test_failing_work_is_told_to_its_caller_alone(scheduler):
    future = scheduler.call(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        future.result(5)
    assert scheduler.is_alive and scheduler.call(lambda: 2).result(5) == 2


@pytest.mark.parametrize("where", ["prompt", "step"])
def test_failing_sequence_ends_with_its_error(scheduler, where):
    deltas: list[Delta] = []
    scheduler.engine.fails = where == "step"
    scheduler.submit(generation(deltas, prompt=[13] if where == "prompt" else [1]))
    wait_for(lambda: deltas)
    assert isinstance(deltas[0].error, RuntimeError)
    scheduler.submit(generation(deltas))
    wait_for(lambda: len(deltas) == 2)
    assert deltas[1].finish == "length"


def test_stopping_finishes_what_was_taken_and_takes_no_more():
    scheduler, deltas = Scheduler(SlowEngine(max_batch=1)), []
    for _ in range(4):
        scheduler.submit(generation(deltas, tokens=20))
    scheduler.stop(drain_s=10)
    assert [delta.finish for delta in deltas] == ["length"] * 4
    with pytest.raises(Stopping, match="Ask again once it is back"):
        scheduler.submit(generation(deltas))
    assert not scheduler.is_alive


def test_stopping_ends_what_takes_too_long():
    scheduler, deltas = Scheduler(SlowEngine()), []
    scheduler.submit(generation(deltas, tokens=10**9))
    wait_for(lambda: scheduler.num_running == 1)
    started = time.monotonic()
    scheduler.stop(drain_s=0.05)
    assert time.monotonic() - started < 4 and scheduler.num_running == 0
    assert isinstance(deltas[0].error, Stopping)


def test_answers_go_on_between_the_pieces_of_other_work(scheduler):
    """One step for each piece; brief work runs too, other work waits."""
    deltas: list[Delta] = []
    order: list[str] = []
    begun = threading.Event()

    def work() -> str:
        begun.set()
        for _ in range(20):
            time.sleep(0.005)
            scheduler.between()
        order.append("long")
        return "done"

    long = scheduler.call(work)
    assert begun.wait(5)
    other = scheduler.call(lambda: order.append("other"))
    brief = scheduler.call(lambda: order.append("brief"), brief=True)
    scheduler.submit(generation(deltas, tokens=10))
    assert long.result(5) == "done" and brief.done()
    assert deltas == [Delta("done", (), "length")]
    other.result(5)
    assert order == ["brief", "long", "other"]


def test_brief_work_runs_together_before_a_step(scheduler):
    gate, started = threading.Event(), threading.Event()

    def wait() -> bool:
        started.set()
        return gate.wait(5)

    steps: list[int] = []
    scheduler.submit(generation([], tokens=5000))
    scheduler.call(wait)
    assert started.wait(5)
    found = [scheduler.call(lambda: steps.append(scheduler.num_steps), brief=True) for _ in range(2)]
    gate.set()
    for one in found:
        one.result(5)
    assert len(set(steps)) == 1


def test_work_in_pieces_ends_with_the_server(scheduler):
    begun = threading.Event()

    def work() -> None:
        begun.set()
        while True:
            time.sleep(0.002)
            scheduler.between()

    future = scheduler.call(work)
    assert begun.wait(5)
    scheduler.stop(drain_s=0.05)
    with pytest.raises(Stopping):
        future.result(1)
