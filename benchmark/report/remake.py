"""Makes the pictures of recorded poison again, for records that have none: drawn pairs only, and only where the poison comes out the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmark.data.eval_sets import Suite, open_suite
from benchmark.data.pairs import Source
from benchmark.data.poison import open_record, poison
from benchmark.data.source import WORLD, open_source
from benchmark.errors import BenchError
from benchmark.evaluate.attack_success import queries
from benchmark.evaluate.hooks import without_hooks
from benchmark.evaluate.measure import Evaluator
from benchmark.evaluate.pictures import gallery_key, keep_pictures, open_pictures
from benchmark.progress import Progress
from benchmark.registry import configure, find
from benchmark.report.records import Run
from benchmark.settings import DataSettings, canonical
from benchmark.stages import Stages


def remake_pictures(runs: Sequence[Run], cache: Path, progress: Progress) -> list[str]:
    """Writes the missing pictures beside the runs; a line for each poison whose pictures cannot be made again, and why."""
    missing: dict[str, Run] = {}
    for run in runs:
        if run.record["poison"]["n_poison"] and open_pictures(run.folder.parents[1], run.record) is None:
            missing.setdefault(f"{run.folder.parents[1]}/{gallery_key(run.record)}", run)
    opened: dict[str, tuple[Source, Suite]] = {}
    stages, notes = Stages(cache, progress.say), []
    with progress.bar("drawing pictures", len(missing), "poisons") as advance:
        for run in missing.values():
            try:
                _remake(run, stages, opened, progress)
            except BenchError as error:
                notes.append(f"no pictures of {run.label('attack')}, seed {run.seed}: {error}")
            advance(1)
    return notes


def _remake(run: Run, stages: Stages, opened: dict[str, tuple[Source, Suite]], progress: Progress) -> None:
    resolved = run.record["resolved"]
    if run.record["data"]["name"] != WORLD:
        raise BenchError("its pairs are not drawn ones; run it again to keep pictures")
    if resolved["attack"]["file"]:
        raise BenchError("its attack was given by a file, which is not run for a report")
    settings = DataSettings(**resolved["data"])
    where = canonical(settings.model_dump())
    if where not in opened:
        opened[where] = open_source(settings, None, None, stages, progress), open_suite(settings, None, stages, progress)
    source, suite = opened[where]
    plugin = find("attack", resolved["attack"]["name"])
    attack = configure(plugin, {}, resolved["attack"]["options"])
    if attack.access != "none":
        raise BenchError("its attack looks at a model of its own, which is not trained for a report; run it again to keep pictures")
    made = poison(plugin, attack, run.seed, source, suite, resolved["sham"], stages)
    record = open_record(made.record)
    probes = attack.probes(suite, record.kept)
    cards = Evaluator(suite, probes, "", stages).cards()
    if record.header["poisoned_manifest_sha256"] != run.record["poison"]["manifest_sha256"] or cards != without_hooks(run.record["cards"]):
        raise BenchError("today's code makes another poison, or asks other questions, than the record's")
    keep_pictures(run.folder.parents[1], run.record, source, suite, made, record, probes, lambda: {probe.name: queries(probe, suite) for probe in probes})
