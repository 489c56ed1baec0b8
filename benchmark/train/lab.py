"""What a defense may use: pairs without labels of poison, cached training, features, grants that are counted."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark.contract import Defense
from benchmark.data.images import Images, pick
from benchmark.data.pack import Pack
from benchmark.data.tokens import Tokenizer
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.registry import plugin_of
from benchmark.seeding import generator
from benchmark.settings import RunSettings, TrainSettings, digest
from benchmark.stages import DONE, Stages, drop_files, file_sha256, write_atomically
from benchmark.train import distributed
from benchmark.train.eda import Eda, Synonyms
from benchmark.train.loop import Budget, TrainingData, handles, snapshot_name, train
from benchmark.train.model import Model, build, load_weights, passes
from benchmark.train.views import TextViews

VERSION = 1


@dataclass(frozen=True)
class PairsView:
    """Image and caption of each row, and nothing else. Rows are handles: positions that tell nothing."""

    images: Images
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class Task:
    """What the model will be asked: class names and prompt templates of the main evaluation set."""

    classnames: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class Granted:
    """Clean pairs as `lab.train(data=...)` takes them; `labels` is None unless labels were granted too."""

    pairs: PairsView
    content: str
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        state: what the defense left in `Defense.state`, on the CPU.
        log: one row an epoch: loss_mean, phase, rates, temperature and what hooks logged.
    """

    model: Model
    state: dict[str, Any]
    log: list[dict[str, Any]]
    _folder: Path = field(repr=False)


@dataclass(frozen=True)
class Neighbourhood:
    """Among what a detector looked for neighbours.

    Attributes:
        k: how many neighbours it looked at.
        groups: rows of each reference set; empty for a set of trusted pairs.
    """

    k: int
    groups: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class Scores:
    """Suspicion handed in by a defense: higher is more suspicious."""

    name: str
    values: NDArray[np.float64]
    flagged: NDArray[np.bool_] | None
    neighbourhood: Neighbourhood | None = None


@dataclass(frozen=True)
class Split:
    """How a defense parted the rows in an epoch of a training: which it kept, and a score (n,), higher = kept rather."""

    epoch: int
    kept: NDArray[np.bool_]
    scores: NDArray[np.float64]


class Lab:
    """The defender's side of the harness. No attribute leads to poison labels, the attack or test images."""

    def __init__(
        self,
        pack: Pack,
        settings: RunSettings,
        tokenizer: Tokenizer,
        task: Task,
        synonyms: tuple[str, Synonyms | None],
        clean: Callable[[int], Granted],
        stages: Stages,
        progress: Progress,
        device: torch.device,
    ) -> None:
        self.pairs = PairsView(pack.images, tuple(pack.captions))
        self.task = task
        self.progress = progress
        self.clean_pairs_used = 0
        self.trainings: list[Path] = []
        self.costs: list[dict[str, Any]] = []
        self.logged: list[str] = []
        self.handed_in: list[Scores] = []
        self.splits: list[Split] = []
        self.warnings: list[str] = []
        self.kept_rows: NDArray[np.int64] | None = None
        self.seconds_in_train = 0.0
        self.seconds_beside: float | None = None
        self.passes_beside: Counter[str] = Counter()
        self._passes_inside: Counter[str] = Counter()
        self._features_of: set[str] = set()
        self.train_settings = settings.train
        self._tokens, self._content = pack.tokens, pack.content
        self._model_settings, self._side = settings.model, settings.data.side
        self._augment, self._augmented, self._seed = settings.augment, settings.augmented, settings.seed
        self._tokenizer, self._synonyms, self._clean, self._stages, self._device = tokenizer, synonyms, clean, stages, device

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator of its own for each purpose of this run's seed."""
        return generator("defense", self._seed, purpose)

    def log(self, line: str) -> None:
        """A line for the person who waits."""
        self.progress.say(line)

    def warn(self, line: str) -> None:
        """A line for the run record: something that changes what a number means."""
        self.warnings.append(line)
        self.progress.say(f"warning: {line}")

    def train(
        self,
        defense: Defense,
        rows: Sequence[int] | NDArray[np.int64] | None = None,
        start: Model | None = None,
        data: Granted | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        weight_decay: float | None = None,
        warmup_frac: float | None = None,
        schedule: Literal["fixed", "official"] | None = None,
        trainable: Literal["all", "image", "text"] = "all",
        augmented: bool | None = None,
    ) -> Trained:
        """Trains with a defense's hooks; the same request is answered from the cache, in this run or another.

        Args:
            rows: handles to train on; they are renumbered from 0. None for all.
            start: a model to continue from, with a fresh optimizer; None for a new one.
            data: granted clean pairs to train on instead of the poisoned ones.
            epochs: sweeps; `steps` gives them as a number of steps, rounded up to whole sweeps.
            trainable: which tower's weights move; the temperature moves with `all`.
            augmented: whether pairs are augmented; None is as the run says, False is the training of a run without `+aug`.
        """
        began, counted = time.perf_counter(), Counter(passes)
        augments = self._augmented and augmented is not False
        if augmented and not self._augmented:
            raise BenchError("lab.train(augmented=True) wants a run with +aug, which says what augmentation is")
        view, plain, content = self._rows(rows, data)
        given = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "warmup_frac": warmup_frac, "schedule": schedule}
        if steps is not None:
            given["epochs"] = max(1, -(-steps // max(1, len(view) // (batch_size or self.train_settings.batch_size))))
        if betas is not None:
            given |= {"beta1": betas[0], "beta2": betas[1]}
        if warmup_frac is not None:
            given["warmup_steps"] = None
        changes = {name: value for name, value in given.items() if value is not None or name == "warmup_steps"}
        settings = TrainSettings(**{**self.train_settings.model_dump(), **changes})
        plugin = plugin_of("defense", type(defense))
        facts = {
            "stage": "train",
            "version": VERSION,
            "rows": content,
            "defense": type(defense).__name__,
            "code": plugin.source,
            "options": defense.model_dump(mode="json"),
            "train": settings.model_dump(),
            "augment": self._augment.model_dump() if augments or _augments_itself(defense) else None,
            "augmented": augments,
            "synonyms": self._synonyms[0] if augments else None,
            "model": self._model_settings.model_dump(),
            "side": self._side,
            "start": start.identity() if start else None,
            "trainable": trainable,
            "seed": self._seed,
            "device": self._device.type,
        } | distributed.facts()
        budget = Budget(settings, self._augment, augments, self._seed)
        folder = self._stages.make("train", facts, partial(self._train, defense, view, plain, start, trainable, budget), resume=True)
        log = json.loads((folder / "log.json").read_text())
        if folder not in self.trainings:
            self.costs.append(json.loads((folder / "cost.json").read_text()))
        self.trainings.append(folder)
        self.logged += [line for row in log for line in row.get("warnings", [])]
        if data is None:
            self.kept_rows = None if rows is None else np.unique(np.asarray(rows, dtype=np.int64))
        model = load_weights(folder / snapshot_name(settings.epochs), self._model_settings, self._side, self._device, settings.precision)
        state = torch.load(folder / "defense.pt", map_location="cpu", weights_only=True)
        self.seconds_in_train += time.perf_counter() - began
        self._passes_inside += Counter(passes) - counted
        return Trained(model, state, log, folder)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Measures what the defense does in the block outside of trainings: seconds, and passes through a tower."""
        began, counted = time.perf_counter(), Counter(passes)
        yield
        self.seconds_beside = time.perf_counter() - began - self.seconds_in_train
        self.passes_beside += Counter(passes) - counted - self._passes_inside

    def untrained(self) -> Model:
        """The run's model before any training."""
        model = build(self._model_settings, self._side, self._seed, self._device, self.train_settings.precision)
        model.net.eval()
        return model

    def features(self, model: Model, raw: bool = False) -> tuple[Tensor, Tensor]:
        """Image and text features (n, d) of all rows, without augmentation; not unit-length if `raw`."""
        facts = {"stage": "features", "version": VERSION, "rows": self._content, "weights": model.identity(), "precision": model.precision} | ({"raw": True} if raw else {})

        def build_features(folder: Path) -> None:
            image, text = model.encode_images(self.pairs.images, raw=raw), model.encode_tokens(self._tokens, raw=raw)
            np.save(folder / "image.npy", image.numpy())
            np.save(folder / "text.npy", text.numpy())

        counted = Counter(passes)
        folder = self._stages.make("features", facts, build_features)
        self._passes_inside += Counter(passes) - counted
        if folder.name not in self._features_of:  # charged in full, whoever computed them, and once
            self._features_of.add(folder.name)
            self.passes_beside += Counter(image_forward=len(self.pairs), text_forward=len(self.pairs))
        return torch.from_numpy(np.load(folder / "image.npy")), torch.from_numpy(np.load(folder / "text.npy"))

    def scores(self, name: str, values: Any, flagged: Any = None, neighbourhood: Neighbourhood | None = None) -> None:
        """Hands in one suspicion score a row (higher = more suspicious), and what the defense itself would flag.

        Detectors that look at neighbours say among which rows, so that the record can tell how much poison was there.
        """
        array = _array(values).astype(np.float64)
        if array.shape != (len(self.pairs),) or not np.isfinite(array).all():
            raise BenchError(f"lab.scores({name!r}) wants one finite value for each of {len(self.pairs)} rows, got shape {array.shape}")
        own = None if flagged is None else _array(flagged)
        if own is not None and own.shape != array.shape:
            raise BenchError(f"lab.scores({name!r}) wants flagged as a mask, bool ({len(array)},), got shape {own.shape}")
        self.handed_in.append(Scores(name, array, None if own is None else own.astype(bool), neighbourhood))

    def split(self, epoch: int, kept: Any, scores: Any) -> None:
        """Hands in how the rows were parted before an epoch (from 1) of the last training, for its curve: bool (n,) and a finite score (n,)."""
        rows, array = _array(kept).astype(bool), _array(scores).astype(np.float64)
        if rows.shape != array.shape or array.shape != (len(self.pairs),) or not np.isfinite(array).all():
            raise BenchError(f"lab.split({epoch}) wants whether each of {len(self.pairs)} rows was kept and a finite score of each, got shapes {rows.shape} and {array.shape}")
        self.splits.append(Split(epoch, rows, array))

    def clean_pairs(self, n: int) -> Granted:
        """Clean pairs, n of them, from a pool that no training row or evaluation image comes from; the count is in every table."""
        granted = self._clean(n)
        self.clean_pairs_used = max(self.clean_pairs_used, n)
        return granted

    def clean_labelled(self, n: int) -> Granted:
        """Clean pairs, n of them, with class labels of `task`; only for data whose clean pool is labelled."""
        granted = self.clean_pairs(n)
        if granted.labels is None:
            raise BenchError("this data set has no labelled clean pairs; a defense that needs labels cannot run on it")
        return granted

    def _rows(self, rows: Sequence[int] | NDArray[np.int64] | None, data: Granted | None) -> tuple[PairsView, NDArray[np.uint16], str]:
        if data is not None:
            tokens, _ = self._tokenizer.encode(data.pairs.captions, self.train_settings.eot)
            return data.pairs, tokens, f"clean:{data.content}"
        if rows is None:
            return self.pairs, self._tokens, self._content
        chosen = handles(rows, len(self.pairs), "lab.train(rows=...)")
        view = PairsView(pick(self.pairs.images, chosen), tuple(self.pairs.captions[row] for row in chosen))
        return view, self._tokens[chosen], f"{self._content}:{digest(chosen.tolist())[:24]}"

    def _train(self, defense: Defense, view: PairsView, plain: NDArray[np.uint16], start: Model | None, trainable: str, budget: Budget, folder: Path) -> None:
        settings = budget.settings
        if distributed.from_first(lambda: _tidied(folder)):
            return  # it was stopped between its last epoch and the stage's marker
        model = build(self._model_settings, self._side, self._seed, self._device, settings.precision)
        if start is not None:
            model.net.load_state_dict(start.net.state_dict())
        if trainable != "all":
            for name, parameter in model.net.named_parameters():
                parameter.requires_grad_(name.startswith("visual.") == (trainable == "image") and name != "logit_scale")
        worker = type(defense)(**defense.model_dump())
        eda = Eda(self._synonyms[1], self._augment.eda_ri) if budget.augmented and self._augment.text == "eda" else None
        texts = TextViews(view.captions, worker, eda, self._tokenizer, settings.eot, self._seed, self._augment.text_aug == "static")
        log = train(model, worker, TrainingData(view.images, plain, texts), budget, folder, self.progress)
        if not distributed.leads():
            return
        torch.save(dict(worker.state), folder / "defense.pt")
        seconds, counted = [row.pop("seconds") for row in log], [row.pop("passes", None) for row in log]
        (folder / "log.json").write_text(json.dumps(log, sort_keys=True))
        cost = {"seconds": sum(seconds), "pairs_trained": sum(row["pairs"] for row in log), "threads": settings.threads, "device": self._device.type}
        if None not in counted:  # an epoch of a version that did not count
            cost["passes"] = sum(map(Counter, counted), Counter())
        write_atomically(folder / "cost.json", json.dumps(cost).encode())
        (folder / "state.pt").unlink(missing_ok=True)


class ToldLab(Lab):
    """The lab of controls that are told the truth; no other defense gets one."""

    def __init__(self, *given: Any, n_poison: int, poisoned_rows: Sequence[int] | None) -> None:
        super().__init__(*given)
        self._n_poison, self._poisoned_rows = n_poison, poisoned_rows

    def told_count(self) -> int:
        """How many rows are poisoned."""
        return self._n_poison

    def told_rows(self) -> Sequence[int]:
        """Which rows are poisoned."""
        if self._poisoned_rows is None:
            raise BenchError("this control is told the count alone")
        return self._poisoned_rows


def snapshots(folder: Path) -> dict[int, Path]:
    """Epoch to weights file, of a finished training; those dropped after evaluation are not there."""
    return {int(path.stem.removeprefix("epoch-")): path for path in sorted(folder.glob("epoch-*.safetensors"))}


def drop_snapshots(folder: Path) -> None:
    """Removes every snapshot but the last."""
    drop_files(folder, [path.name for path in list(snapshots(folder).values())[:-1]])


def weights_hash(path: Path) -> str:
    """SHA-256 of a snapshot, from the stage's marker."""
    marker = json.loads((path.parent / DONE).read_text())
    found = marker["files"].get(path.name)
    return str(found[1]) if found else file_sha256(path)


def _tidied(folder: Path) -> bool:
    """Removes halves of files that a killed process left in an unfinished training; whether it lacks nothing but its marker."""
    for path in folder.glob(".*"):
        path.unlink()
    return (folder / "cost.json").is_file()  # written last


def _array(values: Any) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _augments_itself(defense: Defense) -> bool:
    """Whether hooks may call `now.augment`, so that the augmentation is part of the key without `+aug` too."""
    cls = type(defense)
    return any(getattr(cls, hook) is not getattr(Defense, hook) for hook in ("captions", "views", "loss", "plan"))
