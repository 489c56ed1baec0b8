"""Evaluates a model: cheap metrics of every snapshot, all metrics of the last; each a stage of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from benchmark.contract import Probe
from benchmark.data.eval_sets import Suite
from benchmark.errors import BenchError
from benchmark.evaluate.attack_success import Queries, attack_success, card_of, check_queries, queries
from benchmark.evaluate.features import Encoder, on_prompts
from benchmark.evaluate.linear_probe import Fitted, linear_probe, missing_probe, predicted
from benchmark.evaluate.metric import Metric, rate
from benchmark.evaluate.retrieval import Retrieval, retrieval_card, retrieval_queries, retrieval_success
from benchmark.evaluate.zero_shot import test_name, zero_shot
from benchmark.settings import canonical, digest
from benchmark.stages import Stages
from benchmark.train.model import Model

VERSION = 1


@dataclass
class Evaluator:
    """Evaluation sets and probes of a cell, with the triggered test images stamped once."""

    suite: Suite
    probes: Sequence[Probe]
    poison_key: str
    stages: Stages
    _asked: dict[str, Queries | Retrieval] | None = None

    def asked(self) -> dict[str, Queries | Retrieval]:
        """The queries of each probe."""
        if self._asked is None:
            stamped: dict[str, NDArray[np.uint8]] = {}
            self._asked = {probe.name: ask(probe, self.suite, stamped) for probe in self.probes}
        return self._asked

    def cards(self) -> dict[str, Any]:
        """What the numbers refer to, by the hash that the metrics carry."""
        found: list[dict[str, Any]] = []
        for probe in self.probes:
            asked = self.asked()[probe.name]
            found.append(retrieval_card(probe, asked, self.suite) if isinstance(asked, Retrieval) else card_of(probe, asked, self.suite))
        for eval_set in self.suite.sets.values():
            found += [eval_set.card, {**eval_set.card, "probe": "lbfgs"}]
        return {digest(card)[:16]: card for card in found}

    def not_run(self) -> dict[str, str]:
        """Metrics of the linear probe that have no value, as `name/of`, and why."""
        reasons = {eval_set.name: eval_set.no_probe for eval_set in self.suite.sets.values() if eval_set.no_probe}
        of_sets = {f"{metric.name}/{name}": reason for name, reason in reasons.items() for metric in missing_probe(self.suite.get(name))}
        return of_sets | {f"linear_probe_asr/{one.name}": reasons[one.eval_set] for one in self.probes if has_linear_probe(one) and one.eval_set in reasons}

    def facts(self, weights: Sequence[str], precision: str, probe: str | None) -> dict[str, Any]:
        """What an evaluation depends on."""
        return {"stage": "evaluate", "version": VERSION, "weights": list(weights), "suite": self.suite.content, "poison": self.poison_key, "precision": precision, "probe": probe}

    def measure(self, load: Any, weights: Sequence[str], precision: str, probe: str | None) -> Path:
        """The finished evaluation of models with these weight hashes.

        Args:
            load: called without arguments for the models if they must be encoded.
            probe: name of the linear probe, or None to leave it out.

        Raises:
            BenchError: a linear probe other than `lbfgs`.
        """
        if probe not in (None, "lbfgs"):
            raise BenchError(f"linear probe {probe!r} is not available yet; use --set evaluation.linear_probe=lbfgs or none")
        return self.stages.make("evaluate", self.facts(weights, precision, probe), partial(self._build, load, probe))

    def _build(self, load: Any, probe: str | None, folder: Path) -> None:
        models: list[Model] = load()
        encoder = Encoder(models)
        metrics: list[Metric] = []
        tables: dict[str, pd.DataFrame] = {}
        for eval_set in self.suite.sets.values():
            found, tables[f"zero_shot-{eval_set.name}"] = zero_shot(encoder, eval_set)
            metrics += found
        for one in self.probes:
            asked = self.asked()[one.name]
            if isinstance(asked, Retrieval):
                found, tables[f"attack-{one.name}"] = retrieval_success(encoder, one, asked, self.suite)
            else:
                found, tables[f"attack-{one.name}"] = attack_success(encoder, one, asked, self.suite)
            metrics += found
        if probe is not None:
            metrics += self._linear_probes(encoder, tables)
        main = self.suite.main
        flags = {"collapsed": encoder.collapsed(test_name(main), main.test.images)}
        (folder / "metrics.json").write_text(canonical({"metrics": [metric.as_json() for metric in metrics], **flags}))
        (folder / "predictions").mkdir()
        for name, table in tables.items():
            table.to_parquet(folder / "predictions" / f"{name}.parquet", compression="zstd", index=False)

    def _linear_probes(self, encoder: Encoder, tables: dict[str, pd.DataFrame]) -> list[Metric]:
        """The metrics; what the probes predict joins the tables."""
        metrics: list[Metric] = []
        fitted: dict[str, Fitted] = {}
        by_set = {}
        for eval_set in self.suite.sets.values():
            if eval_set.no_probe:
                metrics += missing_probe(eval_set)
                continue
            found, by_set[eval_set.name] = linear_probe(encoder, eval_set, fitted)
            metrics += found
            tables[f"linear_probe-{eval_set.name}"] = predicted(encoder, eval_set, by_set[eval_set.name])
        for one in self.probes:
            asked = self.asked()[one.name]
            if isinstance(asked, Retrieval) or one.trigger is None or not has_linear_probe(one):
                continue
            counts, card = asked.attacked(one), digest(card_of(one, asked, self.suite))[:16]
            if one.eval_set not in by_set:
                metrics.append(rate("linear_probe_asr", one.name, 0, 0, card))
            else:
                features = torch.cat(encoder.images(f"{asked.name}/{digest(one.trigger.spec())[:16]}", asked.triggered), dim=1)
                classes = by_set[one.eval_set].predict(features)
                tables[f"attack-{one.name}"]["pred_linear_probe"] = classes.numpy()
                hit = classes == asked.goal
                metrics.append(rate("linear_probe_asr", one.name, int(hit[counts].sum()), int(counts.sum()), card))
        return metrics


def ask(probe: Probe, suite: Suite, stamped: dict[str, NDArray[np.uint8]] | None = None) -> Queries | Retrieval:
    """What a probe asks, with its trigger stamped; `stamped` as in `queries`.

    Raises:
        BenchError: a probe whose parts do not fit its task or its evaluation set.
    """
    return queries(probe, suite, stamped) if probe.task == "classify" else retrieval_queries(probe, suite)


def check_probe(probe: Probe, suite: Suite) -> None:
    """Raises what measuring the probe would raise, without a model; no trigger is stamped on test images.

    Raises:
        BenchError: a probe whose parts do not fit its task or its evaluation set, or a retrieval none of whose queries counts.
    """
    if probe.task == "classify":
        check_queries(probe, suite)
    else:
        retrieval_queries(probe, suite)


def has_linear_probe(probe: Probe) -> bool:
    """Whether classifiers of image features measure it too: images with a trigger, no control, and no text key, which they would not see."""
    return probe.task == "classify" and probe.trigger is not None and probe.control is None and not on_prompts(probe.trigger)


def read(folder: Path) -> tuple[list[Metric], bool]:
    """The metrics of a finished evaluation, and whether the model had collapsed."""
    found = json.loads((folder / "metrics.json").read_text())
    return [Metric(**metric) for metric in found["metrics"]], bool(found["collapsed"])
