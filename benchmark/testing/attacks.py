"""What is checked of an attack."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from benchmark.contract import Attack, Probe
from benchmark.data.poison import Poisoned, SealedRecord, open_record, read_image
from benchmark.evaluate.measure import ask
from benchmark.evaluate.retrieval import Retrieval
from benchmark.settings import canonical, digest
from benchmark.testing.expect import Check, check_described, expect, expect_untouched, instance, watched
from benchmark.testing.world import World


@contextmanager
def attack_checks(cls: type[Attack]) -> Iterator[list[Check]]:
    """The checks of an attack, on data that lie in a folder until the block ends."""
    with tempfile.TemporaryDirectory(prefix="bench-check-") as folder:
        subject = _AttackSubject(cls, World(Path(folder)))
        yield [
            ("the docstring names its source and every option says what it does", partial(check_described, cls)),
            ("exactly n_poison rows change and the rest stay", subject.check_rows),
            ("global generators are left alone", subject.check_generators),
            ("the same seed gives the same bytes", subject.check_repeats),
            ("another seed gives other poison", subject.check_seeds),
            ("an attack that edits rows declares a probe", subject.check_declares),
            ("probes of another process name an evaluation set and a goal in it", subject.check_probes),
            ("the trigger at test is the one that was stamped", subject.check_trigger),
        ]


@dataclass
class _AttackSubject:
    cls: type[Attack]
    world: World

    @cached_property
    def watched(self) -> tuple[Poisoned, list[str]]:
        return watched(lambda: self._poison(0, "first"))

    @property
    def first(self) -> Poisoned:
        return self.watched[0]

    def check_generators(self) -> None:
        expect_untouched(self.watched[1])

    @cached_property
    def record(self) -> SealedRecord:
        return open_record(self.first.record)

    @cached_property
    def probes(self) -> list[Probe]:
        return list(instance("attack", self.cls).probes(self.world.suite, self.record.kept))

    def check_rows(self) -> None:
        train, record = self.world.source.train, self.record
        before = {row_id: (ref, caption) for row_id, ref, caption in zip(train.ids, train.refs, train.captions, strict=True)}
        sealed_ids = set(record.rows["id"])
        ids, refs, captions = self.first.rows()
        expect(len(ids) == len(set(ids)), "two rows have one id")
        expect(set(before) <= set(ids), f"{len(set(before) - set(ids))} rows are gone; edits append or replace and never delete")
        changed = {row_id for row_id, ref, caption in zip(ids, refs, captions, strict=True) if before.get(row_id) != (ref, caption) and not self._same(row_id, ref, caption)}
        expect(changed == sealed_ids, f"{len(changed)} rows differ from the clean ones and the record holds {len(sealed_ids)}; every edit must change its row")
        expect(len(changed) == record.n_poison, f"expected {record.n_poison} changed rows, got {len(changed)}")

    def check_repeats(self) -> None:
        again = self._poison(0, "again")
        files = [
            {str(path.relative_to(root.manifest.parent)): path.read_bytes() for path in sorted(root.manifest.parent.rglob("*")) if path.is_file()} for root in (self.first, again)
        ]
        differing = sorted(name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name))
        expect(not differing, f"two runs with one seed differ in {', '.join(differing[:3])}; draw from lab.rng or lab.choose alone")

    def check_seeds(self) -> None:
        if self.record.n_poison:
            other = self._poison(1, "other")
            expect((other.manifest / "manifest.tsv").read_bytes() != (self.first.manifest / "manifest.tsv").read_bytes(), "seeds 0 and 1 give the same poison")

    def check_declares(self) -> None:
        expect(bool(self.probes) or not self.record.n_poison, "it edits rows and declares no probe, so nothing says what success is")

    def check_probes(self) -> None:
        seen = set()
        for probe in self.probes:
            expect(probe.name not in seen, f"two probes are named {probe.name!r}")
            seen.add(probe.name)
            eval_set = self.world.suite.get(probe.eval_set)
            expect(bool(probe.ks) and probe.ks[0] == 1, f"probe {probe.name!r}: the first k must be 1, got {probe.ks}")
            asked = ask(probe, self.world.suite)
            if isinstance(asked, Retrieval):
                continue
            n_classes = len(eval_set.classnames)
            bad = sorted({int(goal) for goal in asked.goal if not 0 <= int(goal) < n_classes})
            expect(not bad, f"probe {probe.name!r} has goal {bad[:1]}, and {eval_set.name} has classes 0 to {n_classes - 1}")
            expect(max(probe.ks) < n_classes, f"probe {probe.name!r}: k = {max(probe.ks)} of {n_classes} classes is no success")
            expect(bool(asked.attacked(probe).any()), f"probe {probe.name!r} counts no query")

    def check_trigger(self) -> None:
        stamped = set(self.record.header["triggers"])
        for probe in self.probes:
            if probe.trigger is not None and probe.control is None:
                canonical(probe.trigger.spec())
                expect(
                    digest(probe.trigger.spec())[:16] in stamped,
                    f"probe {probe.name!r} has a trigger that lab.stamp never put on a training image, nor lab.stamp_text on a caption",
                )

    def _poison(self, seed: int, place: str) -> Poisoned:
        return self.world.poisoned(instance("attack", self.cls), seed, place)

    def _same(self, row_id: str, ref: str, caption: str) -> bool:
        """Whether an edited row shows the very pixels and caption it had."""
        train = self.world.source.train
        if row_id not in train.ids:
            return False
        row = train.ids.index(row_id)
        image = train.image(row) if ref == train.refs[row] else read_image(ref, self.first.manifest, train.side)
        return caption == train.captions[row] and np.array_equal(image, train.images[row])
