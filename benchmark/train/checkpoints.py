"""Checkpoints of any origin as a `Model`: architecture, preprocessing, strict names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmark.errors import BenchError
from benchmark.settings import digest
from benchmark.stages import DONE, file_sha256
from benchmark.train.checkpoint_card import ABOUT, ROLES, WEIGHTS, Preprocessing, check_self_test, patterns, read_card, read_json, said
from benchmark.train.model import MEAN, STD, Colour, Model, assemble, configuration, plain, published, resized
from benchmark.train.weights import Weights, logarithmic, misfit, read_weights

_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers"}

Writer = Literal["auto", "open_clip", "cyclip"]


@dataclass(frozen=True)
class Ask:
    """What a person says of a checkpoint whose file does not.

    Attributes:
        model: name of an open_clip architecture, `bench-small`, or a JSON file with an open_clip configuration.
        side: image side in pixels; None is the architecture's, and `usual_side` where the architecture takes any.
        writer: who wrote an `epoch_N.pt`, where the file leaves it open. `cyclip` is the quick-GELU configuration.
        exponential: whether `logit_scale` in the file is no logarithm.
    """

    model: str | None = None
    side: int | None = None
    usual_side: int = 32
    context_length: int | None = None
    precision: str | None = None
    mean: Colour | None = None
    std: Colour | None = None
    writer: Writer = "auto"
    exponential: bool = False


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that passed every check.

    Attributes:
        dialect: own, own snapshot, state_dict, open_clip_train, cyclip, pretrained, or trainer for an `epoch_N.pt` of either family.
        training: what a snapshot of this program was trained with; None for every other file.
        about: what `checkpoint.json` says.
        notes: lines for the run record.
    """

    model: Model
    name: str
    dialect: str
    preprocessing: Preprocessing
    role: str = "unknown"
    epoch: int | None = None
    training: dict[str, Any] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line that shows a wrong or empty file at once."""
        model = self.model
        n = sum(parameter.numel() for parameter in model.net.parameters())
        with torch.no_grad():
            scale = float(model.scale)
        first, second = model.encode_images(patterns(model.side)[:2])
        tested = ", self-test passed" if self.dialect == "own" else ""
        return (
            f"{self.name}: {self.dialect}, {model.name}, {n:,} parameters, logit scale {scale:.3g}, weights {model.weights_sha256()[:12]}, "
            f"cosine of two unlike images {float(first @ second):.3f}{tested}"
        )


def load_checkpoint(path: Path, device: torch.device, ask: Ask | None = None) -> Loaded:
    """The model in a file, or in a folder that this program wrote; names and shapes must match exactly.

    Args:
        path: a file of weights, an exported folder, or the folder of a finished training (its last snapshot).

    Raises:
        BenchError: the file is missing, unsafe, broken or of another architecture, or an exported one fails its self-test.
    """
    ask = ask or Ask()
    path = _file_in(path)
    if path.name == WEIGHTS and path.with_name(ABOUT).is_file():
        return _own(path, device, ask)
    facts = _training_of(path)
    if facts is not None:
        return _snapshot(path, facts, device, ask)
    if ask.model is None:
        raise BenchError(f"{path} does not say which architecture it is of; name it with --model, for instance --model RN50")
    weights = read_weights(path)
    name, config, recorded = _architecture(ask.model)
    name, config, dialect = _of_writer(path, weights, name, config, ask.writer)
    preprocessing, notes = _preprocessing(ask, config, recorded, "config")
    if preprocessing.source == "assumed":
        notes += ("the checkpoint does not say how images were normalised; CLIP's mean and standard deviation are assumed",)
    model = _fill(path, weights.state, name, config, preprocessing, device, ask)
    return Loaded(model, path.stem, dialect, preprocessing, epoch=weights.epoch, notes=notes)


def load_pretrained(tag: str, device: torch.device, ask: Ask) -> Loaded:
    """The model of weights that open_clip knows by architecture and tag, if they are cached; nothing is downloaded.

    Raises:
        BenchError: an unknown tag, weights that are not cached, or an activation other than the architecture's.
    """
    if ask.model is None:
        raise BenchError(f"--pretrained {tag} needs --model: the architecture these weights are of")
    name, config, _ = _architecture(ask.model)
    facts = published(name, tag)
    if facts.get("quick_gelu") and not config.get("quick_gelu"):
        raise BenchError(f"weights {tag!r} of {name} were trained with quick GELU; use --model {name}-quickgelu")
    path = _cached(name, tag, facts)
    preprocessing, notes = _preprocessing(ask, config, facts, "pretrained")
    model = _fill(path, read_weights(path).state, name, config, preprocessing, device, ask)
    return Loaded(model, f"{name}-{tag}", "pretrained", preprocessing, notes=notes)


def _own(path: Path, device: torch.device, ask: Ask) -> Loaded:
    file = path.with_name(ABOUT)
    about = read_card(path)
    config = checked(about.model, about.model_cfg)
    prepared = about.preprocessing
    _agree(file, ask, side=prepared.side, model=about.model, mean=prepared.mean, std=prepared.std)
    preprocessing = Preprocessing(prepared.side, prepared.mean, prepared.std, prepared.interpolation, "recorded")
    model = _fill(path, read_weights(path).state, about.model, config, preprocessing, device, ask)
    check_self_test(path, model, about)
    said = {"manifest_sha256": about.manifest_sha256, **about.about}
    return Loaded(model, path.parent.resolve().name, "own", preprocessing, about.role if about.role in ROLES else "unknown", about=said)


def _snapshot(path: Path, facts: dict[str, Any], device: torch.device, ask: Ask) -> Loaded:
    """A snapshot that a training of this program left: its stage says the architecture, the side and the hash."""
    settings = facts["model"]
    preprocessing = Preprocessing(int(facts["side"]), MEAN, STD, source="recorded")
    _agree(path, ask, side=preprocessing.side, model=settings["name"], mean=MEAN, std=STD)
    name, config, _ = _architecture(settings["name"])
    config = resized(config, preprocessing.side, settings["context_length"])
    ask = replace(ask, context_length=None, precision=ask.precision or facts["train"]["precision"])
    model = _fill(path, read_weights(path).state, name, config, preprocessing, device, ask)
    epoch = re.fullmatch(r"epoch-(\d+)", path.stem)
    return Loaded(model, path.stem, "own snapshot", preprocessing, epoch=int(epoch[1]) if epoch else None, training=facts)


def _training_of(path: Path) -> dict[str, Any] | None:
    """What the finished training was asked for that this snapshot lies in, or None."""
    marker = path.with_name(DONE)
    if path.suffix != ".safetensors" or not marker.is_file():
        return None
    stage = read_json(marker)
    facts = stage.get("facts")
    if not isinstance(facts, dict) or facts.get("stage") != "train":
        return None
    listed = stage.get("files", {}).get(path.name)
    if listed is None or listed[1] != file_sha256(path):
        raise BenchError(f"{path} has other bytes than when it was written; train it again")
    return facts


def _agree(file: Path, ask: Ask, **recorded: Any) -> None:
    """Options that contradict what is written beside the weights are refused."""
    for name, value in recorded.items():
        given = getattr(ask, name)
        if given is not None and given != value:
            option = "--set data.side" if name == "side" else f"--{name}"
            raise BenchError(f"{file} is of {name} {said(value)}, and {option} says {said(given)}; leave the option out")


def _file_in(path: Path) -> Path:
    if not path.exists():
        raise BenchError(f"no checkpoint at {path}")
    if not path.is_dir():
        return path
    snapshots = sorted(path.glob("epoch-*.safetensors")) if (path / DONE).is_file() else []
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if snapshots:
        return snapshots[-1]
    raise BenchError(f"{path} is a folder without {WEIGHTS} or a finished training's snapshots; name the file")


def _architecture(given: str) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Name and configuration, and the preprocessing that a configuration file names."""
    if not given.endswith(".json"):
        return given, configuration(given), None
    content = read_json(Path(given))
    config = content.get("model_cfg", content)
    if not isinstance(config, dict):
        raise BenchError(f"{given} holds no open_clip configuration: expected embed_dim, vision_cfg and text_cfg")
    recorded = content.get("preprocess_cfg") or content.get("preprocessing")
    return f"{Path(given).stem}@{digest(config)[:6]}", checked(given, config), recorded if isinstance(recorded, dict) else None


def checked(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration from a file, if it is of a plain CLIP whose parts need no download.

    Raises:
        BenchError: it lacks a part, or has one that is not CLIP's.
    """
    for key, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict)):
        if not isinstance(config.get(key), kind):
            raise BenchError(f"{name} holds no open_clip configuration: {key} is missing or of another kind; expected embed_dim, vision_cfg and text_cfg")
    config = plain(name, config)
    other = sorted(config["text_cfg"].keys() - _TEXT_KEYS) + sorted(config.keys() - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"})
    if other:
        raise BenchError(f"{name} asks for {', '.join(other)}, which a plain CLIP does not have; its text tower takes {', '.join(sorted(_TEXT_KEYS))}")
    if config["text_cfg"].get("vocab_size", 49408) != 49408:
        raise BenchError(f"{name} has a vocabulary of {config['text_cfg']['vocab_size']} tokens; this program's tokenizer has 49408")
    vision = dict(config["vision_cfg"])
    if "timm_model_name" in vision:
        if not re.fullmatch(r"[\w.]+", str(vision["timm_model_name"])):
            raise BenchError(f"{name}: timm_model_name {vision['timm_model_name']!r} is no plain name of a timm architecture")
        vision["timm_model_pretrained"] = False
    if not isinstance(vision.get("image_size"), int):
        raise BenchError(f"{name}: vision_cfg.image_size must be one number; images are square here")
    return {**config, "vision_cfg": vision}


def _of_writer(path: Path, weights: Weights, name: str, config: dict[str, Any], writer: Writer) -> tuple[str, dict[str, Any], str]:
    """Name and configuration with the activation that the writer's models have.

    open_clip_train and the CyCLIP family write the same file for models that differ in their activation.
    """
    if weights.writer == "trainer" and writer == "auto" and "quick_gelu" not in config:
        raise BenchError(
            f"{path} could come from open_clip_train or from the CyCLIP family, whose models have another activation under the same names; "
            f"say --writer open_clip, or --writer cyclip (quick GELU: CyCLIP, CleanCLIP, RoCLIP, SafeCLIP)"
        )
    if writer == "cyclip":
        quick = name if config.get("quick_gelu") else f"{name}-quickgelu"
        return quick, {**config, "quick_gelu": True}, "cyclip"
    return name, config, "open_clip_train" if writer == "open_clip" and weights.writer == "trainer" else weights.writer


def _preprocessing(ask: Ask, config: dict[str, Any], recorded: Mapping[str, Any] | None, source: str) -> tuple[Preprocessing, tuple[str, ...]]:
    if (ask.mean is None) != (ask.std is None):
        raise BenchError("give --mean and --std together, for instance --mean 0,0,0 --std 1,1,1 for a model trained without normalisation")
    notes = []
    mean, std, interpolation = MEAN, STD, "bicubic"
    if recorded is not None:
        mean, std = _colour(recorded.get("mean"), MEAN), _colour(recorded.get("std"), STD)
        interpolation = str(recorded.get("interpolation") or "bicubic")
        resize = str(recorded.get("resize_mode") or "shortest")
        if interpolation not in ("bicubic", "random") or resize != "shortest":
            notes.append(f"the model was made for images resized by {interpolation}, {resize}; here they are resized by bicubic, shortest")
    else:
        source = "assumed"
    if ask.mean is not None and ask.std is not None:
        mean, std, source = ask.mean, ask.std, "given"
    side = ask.side or (ask.usual_side if config["vision_cfg"].get("timm_model_name") == "bench_small_convnet" else int(config["vision_cfg"]["image_size"]))
    return Preprocessing(side, mean, std, interpolation, source), tuple(notes)


def _colour(value: Any, otherwise: Colour) -> Colour:
    if value is None:
        return otherwise
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(isinstance(part, int | float) and math.isfinite(part) for part in value):
        raise BenchError(f"expected a mean and a standard deviation of three numbers each, got {value!r}")
    red, green, blue = map(float, value)
    return red, green, blue


def _fill(path: Path, state: dict[str, Tensor], name: str, config: dict[str, Any], prepared: Preprocessing, device: torch.device, ask: Ask) -> Model:
    """A model of this configuration with these weights, in eval mode."""
    config = resized(config, prepared.side, ask.context_length)
    try:
        model = assemble(name, config, 0, device, ask.precision or "fp32", prepared.mean, prepared.std)
    except Exception as error:
        raise BenchError(f"open_clip cannot build {name} at {prepared.side} px: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    state = logarithmic(state, ask.exponential, path)
    problem = misfit(model.net.state_dict(), state)
    if problem is not None:
        raise BenchError(f"{path} does not hold weights of {name} at {prepared.side} px and {model.tokenizer.context_length} tokens: {problem}.{_advice(problem)}")
    model.net.load_state_dict(state, strict=True)
    model.net.eval()
    return model


def _advice(problem: str) -> str:
    if " missing (" in problem or " unexpected (" in problem:
        return " --model names the architecture."
    found = []
    if "visual." in problem and "positional_embedding" in problem:
        found.append("the image side, with --set data.side=N")
    if re.search(r"(?<![.\w])positional_embedding \(", problem):
        found.append("the context length, with --set model.context_length=N")
    return f" Perhaps it is {' or '.join(found)}." if found else ""


def _cached(name: str, tag: str, facts: dict[str, Any]) -> Path:
    """The file of pretrained weights where open_clip would have put it."""
    from huggingface_hub import try_to_load_from_cache

    if "file" in facts:
        return Path(facts["file"])
    repository, _, file = str(facts.get("hf_hub") or "").rpartition("/")
    files = [file, re.sub(r"\.(bin|pth)$", ".safetensors", file)] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    for one in files if repository else []:
        found = try_to_load_from_cache(repository, one)
        if isinstance(found, str):
            return Path(found)
    url = str(facts.get("url") or "")
    old = Path.home() / ".cache" / "clip" / url.rpartition("/")[2]
    if url and old.is_file():
        return old
    raise BenchError(
        f"weights {tag!r} of {name} are not cached on this machine, and this command downloads nothing. Where there is a network, "
        f"open_clip.create_model({name!r}, pretrained={tag!r}) fetches them{f' from {repository}' if repository else ''}; or give a file with --checkpoint"
    )
