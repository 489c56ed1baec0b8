"""What a person sees of long work: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_PLAIN_SECONDS = 15.0
_COLUMNS = (
    TextColumn("{task.description}", markup=False),
    BarColumn(bar_width=30),
    MofNCompleteColumn(),
    TextColumn("{task.fields[rate]}"),
    TextColumn("{task.fields[facts]}", markup=False),
    TimeRemainingColumn(compact=True),
)


@dataclass
class Progress:
    """Where long work says how far it is. Everything goes to stderr; tables go to stdout."""

    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))
    label: str = ""
    quiet: bool = False
    queue: Any = None  # where a worker process sends what its parent shows

    def say(self, line: str) -> None:
        """One line of plain text, whatever marks it holds."""
        if self.quiet:
            return
        prefixed = f"[{self.label}] {line}" if self.label else line
        if self.queue is not None:
            self.queue.put(("say", prefixed))
        else:
            self.console.print(prefixed, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int, unit: str, before: int = 0) -> Iterator[Callable[..., None]]:
        """Yields `advance(n, **facts)`; facts such as `loss=` stand at the end of the line.

        Args:
            before: how many of `total` an earlier process has done; they are shown as done and count for no speed.
        """
        if self.quiet:
            yield lambda n, **facts: None
        elif self.queue is not None:
            with self._sent(what, total, unit, before) as advance:
                yield advance
        elif self.console.is_terminal:
            with self._rich(what, total, unit, before) as advance:
                yield advance
        else:
            with self._plain(what, total, unit, before) as advance:
                yield advance

    @contextlib.contextmanager
    def _sent(self, what: str, total: int, unit: str, before: int) -> Iterator[Callable[..., None]]:
        name = f"{self.label} {what}".strip()
        began, sent, done = time.monotonic(), 0.0, before

        def advance(n: int, **facts: Any) -> None:
            nonlocal sent, done
            done += n
            now = time.monotonic()
            if now - sent >= 0.5 or done >= total:
                sent = now
                self.queue.put(("bar", name, done, total, f"{(done - before) / max(now - began, 1e-9):,.0f} {unit}/s", _facts(facts)))

        yield advance
        self.queue.put(("end", name))

    @contextlib.contextmanager
    def _rich(self, what: str, total: int, unit: str, before: int) -> Iterator[Callable[..., None]]:
        began = time.monotonic()
        with RichProgress(*_COLUMNS, console=self.console, transient=True) as bars:
            task = bars.add_task(f"{self.label} {what}".strip(), total=total, completed=before, rate="", facts="")
            done = before

            def advance(n: int, **facts: Any) -> None:
                nonlocal done
                done += n
                rate = (done - before) / max(time.monotonic() - began, 1e-9)
                bars.update(task, advance=n, rate=f"{rate:,.0f} {unit}/s", facts=_facts(facts))

            yield advance

    @contextlib.contextmanager
    def _plain(self, what: str, total: int, unit: str, before: int) -> Iterator[Callable[..., None]]:
        began = said = time.monotonic()
        done = before

        def advance(n: int, **facts: Any) -> None:
            nonlocal done, said
            done += n
            now = time.monotonic()
            if now - said >= _PLAIN_SECONDS:
                said = now
                rate = (done - before) / (now - began)
                self.say(f"{what}: {done:,}/{total:,} {unit}, {rate:,.0f}/s, {_facts(facts)}{(total - done) / max(rate, 1e-9):,.0f} s left")

        yield advance


@contextlib.contextmanager
def shown(queue: Any, console: Console) -> Iterator[None]:
    """Shows the bars and lines that worker processes put into `queue`, until the block ends."""
    with RichProgress(*_COLUMNS, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def listen() -> None:
            while (message := queue.get()) is not None:
                match message:
                    case ("say", line):
                        console.print(line, markup=False, soft_wrap=True)
                    case ("bar", name, done, total, rate, facts):
                        if name not in tasks:
                            tasks[name] = bars.add_task(name, total=total, rate="", facts="")
                        bars.update(tasks[name], completed=done, rate=rate, facts=facts)
                    case ("end", name):
                        if name in tasks:
                            bars.remove_task(tasks.pop(name))

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            yield
        finally:
            queue.put(None)
            listener.join(timeout=5)


def silent() -> Progress:
    """A progress that shows nothing, for tests and notebooks."""
    return Progress(console=Console(file=sys.stderr), quiet=True)


def _facts(facts: dict[str, Any]) -> str:
    return "".join(f"{name} {value:.3f}, " if isinstance(value, float) else f"{name} {value}, " for name, value in facts.items())
