"""A model of the attacker's own, for attacks that look at features or gradients: plain CLIP on the clean pairs, or a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark.contract import Attack, Defense
from benchmark.data.attack_lab import Surrogate, SurrogateRequest
from benchmark.data.eval_sets import Suite
from benchmark.data.pack import pack
from benchmark.data.pairs import Source
from benchmark.data.poison import poison
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.registry import Plugin
from benchmark.settings import RunSettings
from benchmark.stages import Stages
from benchmark.train.checkpoints import Ask, load_checkpoint
from benchmark.train.lab import Granted, Lab, Task, drop_snapshots, snapshots
from benchmark.train.model import Model, tokenizer

VERSION = 1
_CLEAN = Plugin("attack", "clean", "the pairs as they are", Path(), "")


class Undefended(Defense):
    """Plain CLIP: overrides no hook.

    Source: Radford et al., ICML 2021, arXiv 2103.00020.
    """


@dataclass(frozen=True)
class Surrogates:
    """Trains or loads the surrogate of a run.

    A trained one has the budget, the architecture and the clean pairs of the run, no augmentation, and a seed of its own.
    """

    settings: RunSettings
    source: Source
    suite: Suite
    stages: Stages
    progress: Progress

    def facts(self) -> dict[str, Any]:
        """What a surrogate depends on beside the pairs and the attack's own options."""
        settings = self.settings
        return {"version": VERSION, "train": settings.train.model_dump(), "model": settings.model.model_dump(), "device": settings.device}

    def find(self, wanted: SurrogateRequest) -> Surrogate:
        """The surrogate, from the cache or made now.

        Raises:
            BenchError: the victim's own seed, a checkpoint that does not load, or one for images of another side.
        """
        torch.set_num_threads(self.settings.train.threads)
        device = torch.device(self.settings.device)
        found = self._trained(wanted.seed, device) if wanted.checkpoint is None else self._loaded(wanted, device)
        found.model.net.requires_grad_(False)
        return found

    def _trained(self, seed: int, device: torch.device) -> Surrogate:
        if seed == self.settings.seed:
            raise BenchError(f"the surrogate has seed {seed}, which is the victim's own; give another with --set attack.surrogate_seed")
        clean = poison(_CLEAN, Attack(), 0, self.source, self.suite, False, self.stages)
        tokens = tokenizer(self.settings.model)
        packed = pack(clean, self.source, tokens, self.settings.train.eot, self.stages, self.progress)
        settings = self.settings.model_copy(update={"seed": seed, "augmented": False, "sham": False})
        task = Task(self.suite.main.classnames, self.suite.main.templates)
        lab = Lab(packed, settings, tokens, task, ("none", None), _none_granted, self.stages, self.progress, device)
        self.progress.say("the attack looks at a model of its own: plain CLIP on the clean pairs")
        model = lab.train(Undefended()).model
        folder = lab.trainings[0]
        with self.stages.lock(folder.with_name(folder.name + ".curve")):
            if len(snapshots(folder)) > 1:
                drop_snapshots(folder)
        cost = json.loads((folder / "cost.json").read_text())
        about = {"from": "trained here", "seed": seed, "data_overlap": 1.0, "pairs_trained": cost["pairs_trained"], "training": folder.name}
        return Surrogate(model, _card(model) | about)

    def _loaded(self, wanted: SurrogateRequest, device: torch.device) -> Surrogate:
        assert wanted.checkpoint is not None
        side = self.settings.data.side
        ask = Ask(model=wanted.architecture, usual_side=side, precision=self.settings.train.precision, writer=wanted.writer)
        loaded = load_checkpoint(wanted.checkpoint, device, ask)
        if loaded.model.side != side:
            raise BenchError(f"the surrogate {wanted.checkpoint} takes images of {loaded.model.side} px and these pairs have {side}; use --set data.side={loaded.model.side}")
        about = {"from": "checkpoint", "dialect": loaded.dialect, "seed": None, "data_overlap": None, "pairs_trained": 0, "notes": list(loaded.notes)}
        return Surrogate(loaded.model, _card(loaded.model) | about)


def _card(model: Model) -> dict[str, Any]:
    return {"architecture": model.name, "weights_sha256": model.weights_sha256()}


def _none_granted(n: int) -> Granted:
    raise BenchError("a surrogate is granted no clean pairs")
