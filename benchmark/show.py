"""Listings, descriptions, previews and the doctor: what the program says about itself."""

from __future__ import annotations

import importlib
import inspect
import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmark.errors import BenchError, nearest, unknown
from benchmark.registry import configure, find, names
from benchmark.settings import SCALES

_KINDS = ("attacks", "defenses", "scales", "triggers", "eval-sets")


def listing(what: str) -> str:
    """Names with one line each."""
    if what != "all" and what not in _KINDS:
        raise unknown("listing", what, (*_KINDS, "all"))
    lines: list[str] = []
    for kind in _KINDS if what == "all" else (what,):
        if lines:
            lines.append("")
        lines.append(f"{kind}:")
        if kind == "scales":
            lines += [f"  {name:<12}{scale.summary}" for name, scale in SCALES.items()]
            continue
        if kind == "triggers":
            backdoor: Any = find("attack", "backdoor").load()
            lines.append(f"  {', '.join(backdoor.short_names())}")
            lines.append("  `--set attack.trigger=NAME`; `bench show trigger` draws them")
            continue
        if kind == "eval-sets":
            from benchmark.data.eval_torchvision import KNOWN

            lines += [f"  {name:<12}{known.splits}" for name, known in KNOWN.items()]
            lines.append("  `--eval NAME`, or a folder of your own")
            continue
        singular: Any = kind[:-1]
        width = max(12, *(len(name) + 2 for name in names(singular)))
        for name in names(singular):
            cls = find(singular, name).load()
            facts = f"budget in {cls.budget_unit}, access: {cls.access}" if singular == "attack" else _needs(cls)
            lines.append(f"  {name:<{width}}{_summary(cls)} [{facts}]{f' {cls.paper}' if getattr(cls, 'paper', '') else ''}")
    return "\n".join(lines)


def describe(name: str) -> str:
    """A plugin's docstring, options and presets, or a scale's settings."""
    if name in SCALES:
        scale = SCALES[name]
        sections = {section: dict(getattr(scale, section)) for section in ("data", "train", "augment", "model", "evaluation")}
        lines = [f"{name}: {scale.summary}", ""]
        for section, values in sections.items():
            # Pairs of one's own and evaluation sets bring their own numbers; the side alone is asked of them.
            remarks = {option: " (of drawn pairs)" for option in values if section == "data" and option != "side"}
            lines += [f"  {section}.{option} = {value}{remarks.get(option, '')}" for option, value in values.items()]
        lines += [f"  {plugin}.{option} = {value}" for plugin, options in scale.options.items() for option, value in options.items()]
        return "\n".join(lines)
    found = []
    kinds: tuple[Any, Any] = ("attack", "defense")
    for kind in kinds:
        try:
            plugin = find(kind, name)
            found.append((kind, plugin, plugin.load()))
        except BenchError as error:
            if name.endswith(".py") and "exactly one" not in str(error):
                raise
    if not found:
        known = [*names("attack"), *names("defense"), *SCALES]
        guess = nearest(name, known)
        raise BenchError(f"nothing is named {name!r}.{f' Did you mean {guess!r}?' if guess else ''} `bench list` shows what there is.")
    parts = []
    for kind, plugin, cls in found:
        lines = [f"{plugin.name} ({kind}, {plugin.origin})", "", inspect.cleandoc(cls.__doc__ or "no description"), ""]
        if cls.model_fields:
            lines.append(f"Options, as --set {kind}.NAME=VALUE:")
        for option, about in cls.model_fields.items():
            lines.append(f"  {option} = {about.get_default()!r}  {about.description or ''}")
        lines += [f"Preset {preset}: {', '.join(f'{k}={v}' for k, v in values.items()) or 'the defaults'}" for preset, values in cls.presets.items()]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts)


def picture(path: Path, columns: int = 20, rows: int = 4, side: int = 64) -> Path:
    """Writes a sheet of drawn training images at `side` pixels."""
    from PIL import Image

    from benchmark.data.world import drawn_row

    sheet = Image.new("RGB", (columns * side, rows * side))
    for index in range(columns * rows):
        sheet.paste(Image.fromarray(drawn_row(0, "train", index, side).image), (index % columns * side, index // columns * side))
    try:
        sheet.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None
    return path


def gallery(name: str | None, sets: Sequence[str], path: Path) -> Path:
    """Writes a sheet of what image triggers change: all of them, or the one that is named or that the options choose.

    Args:
        sets: options of the attack `backdoor` as `attack.alpha=0.1`, and `data.side=224` for larger images.
    """
    from benchmark.gallery import shown, write_gallery
    from benchmark.request import parse_set
    from benchmark.settings import DataSettings

    plugin = find("attack", "backdoor")
    options: dict[str, Any] = {} if name is None else {"trigger": name}
    side = DataSettings().side
    for text in sets:
        section, option, value = parse_set(text)
        if (section, option) == ("data", "side"):
            if not isinstance(value, int) or not 16 <= value <= 1024:
                raise BenchError(f"expected data.side in [16, 1024], got {value!r}")
            side = value
        elif section in ("attack", "backdoor"):
            options[option] = value
        else:
            raise BenchError(f"a picture of triggers takes attack.OPTION and data.side, got {text!r}")
    wanted = [options] if options.keys() & {"trigger", "preset"} else [{**options, "trigger": one} for one in plugin.load().short_names()]
    attacks = [configure(plugin, {}, one) for one in wanted]
    return write_gallery([shown(attack.trigger, attack.make_trigger(attack.trigger, side), side) for attack in attacks], path)


def diagnose(results: Path) -> tuple[list[str], bool]:
    """What this installation consists of, and whether it can run."""
    lines, healthy = [f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"], True
    for name in ("torch", "torchvision", "open_clip_torch", "timm", "pandas", "pillow", "scikit-learn", "scipy", "pydantic", "typer", "rich"):
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name}: not installed; pip install clip-poison-bench brings it")
            healthy = False
    try:
        importlib.import_module("benchmark.train.model")
    except Exception as error:
        lines.append(f"open_clip cannot be imported: {error}. torch and torchvision must come from one place: pip install -c constraints.txt torch torchvision")
        healthy = False
    else:
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; small runs on the CPU"
        lines.append(f"GPU: {gpu}")
    kinds: tuple[Any, Any] = ("attack", "defense")
    for kind in kinds:
        broken = []
        for name in names(kind):
            try:
                find(kind, name).load()
            except Exception as error:
                broken.append(f"{name} ({error})")
        lines.append(f"{len(names(kind))} {kind}s" + (f", broken: {'; '.join(broken)}" if broken else ""))
        healthy = healthy and not broken
    from benchmark.train.synonyms import wordnet_folder

    lines.append(f"WordNet: {wordnet_folder() or 'not found; needed for synonyms on data other than the drawn world'}")
    try:
        results.mkdir(parents=True, exist_ok=True)
        probe = results / ".doctor"
        probe.write_text("")
        probe.unlink()
        lines.append(f"results folder {results} is writable, {shutil.disk_usage(results).free / 1e9:.0f} GB free")
    except OSError as error:
        lines.append(f"results folder {results} is not writable: {error.strerror}")
        healthy = False
    lines.append("ready" if healthy else "not ready")
    return lines, healthy


def _needs(cls: type[Any]) -> str:
    """A defense's kind, the clean data that it asks for by default, and what it trusts beside the training code."""
    n_clean = cls().clean_wanted()
    trusts = [*([cls.trusts] if cls.trusts else []), *(["clean pairs"] if n_clean else []), *([f"the {cls.told} it is told"] if cls.told != "nothing" else [])]
    return f"{cls.kind}; clean pairs: {n_clean}{', and labelled images' if cls.needs_support else ''}; trusts: {', '.join(trusts) or 'nothing'}"


def _summary(cls: type[Any]) -> str:
    return (cls.__doc__ or "no description").strip().splitlines()[0]
