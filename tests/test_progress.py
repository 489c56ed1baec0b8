"""What progress says when nobody looks at a terminal, and through a queue of worker processes."""

import io
import queue

import pytest
from rich.console import Console

from benchmark import progress as module
from benchmark.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_what_an_earlier_process_did_is_done_and_counts_for_no_speed(clock):
    out = io.StringIO()
    with Progress(console=Console(file=out, width=200)).bar("training", 1000, "pairs", 600) as advance:
        clock[0] += 20
        advance(100, loss=1.5)
    (line,) = out.getvalue().splitlines()
    assert "700/1,000 pairs, 5/s" in line and "60 s left" in line


@pytest.mark.parametrize(("before", "rate"), [(0, "5 pairs/s"), (600, "5 pairs/s")])
def test_a_worker_sends_how_much_is_done_and_its_own_speed(clock, before, rate):
    sent = queue.Queue()
    with Progress(label="cell", queue=sent).bar("training", 1000, "pairs", before) as advance:
        clock[0] += 20
        advance(100)
    kind, name, done, total, speed, _ = sent.get_nowait()
    assert (kind, name, done, total, speed) == ("bar", "cell training", before + 100, 1000, rate)
