"""What a person sees of long work: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_PLAIN_SECONDS = 15.0


@dataclass
class Progress:
    """Where long work says how far it is. Everything goes to stderr; tables go to stdout."""

    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))
    label: str = ""
    quiet: bool = False

    def say(self, line: str) -> None:
        """One line of plain text, whatever marks it holds."""
        if not self.quiet:
            prefix = f"[{self.label}] " if self.label else ""
            self.console.print(prefix + line, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        """Yields `advance(n, **facts)`; facts such as `loss=` stand at the end of the line."""
        if self.quiet:
            yield lambda n, **facts: None
        elif self.console.is_terminal:
            with self._rich(what, total, unit) as advance:
                yield advance
        else:
            with self._plain(what, total, unit) as advance:
                yield advance

    @contextlib.contextmanager
    def _rich(self, what: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        began = time.monotonic()
        with RichProgress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(f"{self.label} {what}".strip(), total=total, rate="", facts="")
            done = 0

            def advance(n: int, **facts: Any) -> None:
                nonlocal done
                done += n
                rate = done / max(time.monotonic() - began, 1e-9)
                bars.update(task, advance=n, rate=f"{rate:,.0f} {unit}/s", facts=_facts(facts))

            yield advance

    @contextlib.contextmanager
    def _plain(self, what: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        began = said = time.monotonic()
        done = 0

        def advance(n: int, **facts: Any) -> None:
            nonlocal done, said
            done += n
            now = time.monotonic()
            if now - said >= _PLAIN_SECONDS:
                said = now
                rate = done / (now - began)
                self.say(f"{what}: {done:,}/{total:,} {unit}, {rate:,.0f}/s, {_facts(facts)}{(total - done) / max(rate, 1e-9):,.0f} s left")

        yield advance


def silent() -> Progress:
    """A progress that shows nothing, for tests and notebooks."""
    return Progress(console=Console(file=sys.stderr), quiet=True)


def _facts(facts: dict[str, Any]) -> str:
    return "".join(f"{name} {value:.3f}, " if isinstance(value, float) else f"{name} {value}, " for name, value in facts.items())
