"""A tiny drawn world that the tests share, and poison made on it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.data.eval_sets import Suite, open_suite
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord, open_record, poison
from benchmark.data.source import open_source
from benchmark.progress import silent
from benchmark.registry import configure, find
from benchmark.settings import DataSettings
from benchmark.stages import Stages
from benchmark.testing.world import tiny_surrogates

TINY = DataSettings(n_pairs=256, side=32, n_held_out=64, n_clean=64, n_test=100, n_probe=200)

torch.set_num_threads(1)  # as in runs, and so that the workers of pytest-xdist do not crowd one another out

Poison = Callable[..., tuple[Poisoned, SealedRecord]]

LONGEST = ("test_faults.py",)
"""Files that take minutes, of few tests. Each file goes to one worker, so they come first: at the end the others would wait."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Tests kill processes and never the machine, so what this process writes need not reach the disk before the next line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmark.stages.os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def settings() -> DataSettings:
    return TINY


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def source(stages: Stages) -> Source:
    return open_source(TINY, None, None, stages, silent())


@pytest.fixture(scope="session")
def suite(stages: Stages) -> Suite:
    return open_suite(TINY, None, stages, silent())


@pytest.fixture(scope="session")
def poison_with(source: Source, suite: Suite, stages: Stages) -> Poison:
    """Calls an attack by name or file: `poison_with("backdoor", {"rate": 0.1}, seed=1, sham=True, cache=folder)`."""

    def call(name: str, options: dict[str, Any], seed: int = 0, sham: bool = False, cache: Path | None = None) -> tuple[Poisoned, SealedRecord]:
        plugin = find("attack", name)
        surrogates = tiny_surrogates(source, suite, stages, TINY)
        poisoned = poison(plugin, configure(plugin, {}, options), seed, source, suite, sham, stages if cache is None else Stages(cache), surrogates)
        return poisoned, open_record(poisoned.record)

    return call
