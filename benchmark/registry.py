"""Finds plugins by name, by entry point or by file, without importing any that is not asked for."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from benchmark.errors import BenchError, nearest, unknown

Kind = Literal["attack", "defense"]
_GROUP = {"attack": "bench.attacks", "defense": "bench.defenses"}
_PACKAGE = {"attack": "attacks", "defense": "defenses"}
_SCORES = "benchmark.suspicion"  # scores that defenses and `bench audit` share


@dataclass(frozen=True)
class Plugin:
    """Where a plugin comes from; `load` imports it.

    Attributes:
        origin: a file, or `package:Class` of an entry point.
        source: hash of its file and of the `_` modules that it imports.
    """

    kind: Kind
    name: str
    origin: str
    file: Path
    source: str
    by_path: bool = False

    def load(self) -> type[Any]:
        """The plugin's class."""
        return _load(self.kind, self.name, self.origin, self.by_path)


def names(kind: Kind) -> list[str]:
    """Every known name of this kind, found without importing the plugins."""
    return sorted(_origins(kind))


def find(kind: Kind, name: str) -> Plugin:
    """The plugin with this name, or in this file.

    Raises:
        BenchError: an unknown name (with the nearest match), a missing file, two plugins of one name.
    """
    if name.endswith(".py") or "/" in name:
        file = Path(name)
        if not file.is_file():
            raise BenchError(f"no {kind} file at {name}")
        return Plugin(kind, file.stem, str(file.resolve()), file.resolve(), source_hash(file.resolve()), by_path=True)
    origins = _origins(kind)
    if name not in origins:
        raise unknown(kind, name, origins)
    found = origins[name]
    if len(found) > 1:
        raise BenchError(f"two {kind}s are named {name!r}: {' and '.join(found)}. Uninstall one of them")
    origin = found[0]
    file = Path(origin) if origin.endswith(".py") else _file_of_module(origin.partition(":")[0])
    return Plugin(kind, name, origin, file, source_hash(file))


def check_names(kind: Kind, given: Sequence[str]) -> None:
    """Raises BenchError for the first of the names that nothing has; `all` and `+aug` are no part of a name."""
    for name in given:
        if name.removesuffix("+aug") != "all":
            find(kind, name.removesuffix("+aug"))


def plugin_of(kind: Kind, cls: type[Any]) -> Plugin:
    """The plugin that a class stands for, by the file that defines it."""
    file = Path(sys.modules[cls.__module__].__file__ or "")
    return Plugin(kind, file.stem, str(file), file, source_hash(file))


def configure(plugin: Plugin, scale_options: dict[str, Any], given: dict[str, Any]) -> Any:
    """An instance with options from the class, the scale, the preset and the user, later ones first.

    Raises:
        BenchError: an option that does not exist or a value that is not allowed; names the option and what is.
    """
    cls = plugin.load()
    fields = cls.model_fields
    for option in given:
        if option not in fields:
            guess = nearest(option, fields)
            hint = f" Did you mean {guess!r}?" if guess else ""
            known = f"Options of {plugin.name}: {', '.join(sorted(fields))}." if fields else f"{plugin.name} has no options."
            raise BenchError(f"unknown option {plugin.kind}.{option}.{hint} {known}")
    preset = given.get("preset")
    if preset is not None and preset not in cls.presets:
        raise unknown(f"{plugin.name} preset", str(preset), cls.presets)
    # A file of the user's may share its name with a plugin that the scale has options for.
    usual = {option: value for option, value in scale_options.items() if option in fields}
    values = {**usual, **cls.presets.get(preset, {}), **given}
    try:
        return cls(**values)
    except ValidationError as error:
        raise BenchError(_first(error, plugin.kind)) from None


def with_defaults(resolved: Mapping[str, Any], todays: Callable[[Kind, Mapping[str, Any]], Plugin | None]) -> dict[str, Any]:
    """Resolved settings of a record, with options that its plugins have got since set to their defaults.

    Args:
        todays: today's plugin of the recorded name and options; None leaves these as they are.
    """
    filled = dict(resolved)
    kinds: tuple[Kind, ...] = ("attack", "defense")
    for kind in kinds:
        one = resolved[kind]
        with contextlib.suppress(BenchError):  # a plugin that is no longer there, or wants an option
            plugin = todays(kind, one)
            if plugin is not None:
                filled[kind] = {**one, "options": {**configure(plugin, {}, {}).model_dump(mode="json"), **one["options"]}}
    return filled


def source_hash(file: Path) -> str:
    """SHA-256 over the `source_files` of a plugin.

    Comments, docstrings and blank lines do not count: a better explanation trains nothing anew.
    """
    hasher = hashlib.sha256()
    for _, code in sorted((path.name, _code(path.read_bytes())) for path in source_files(file)):
        hasher.update(f"{code}\0".encode())
    return hasher.hexdigest()[:16]


def source_files(file: Path) -> list[Path]:
    """A file, and the `_` modules and scores that it imports, directly or through one another.

    Of a file that is in no package, which finds what lies beside it by its bare name, any module that does.
    """
    return sorted(_sources(file, set()))


@cache
def _code(content: bytes) -> str:
    """A file's content without comments, docstrings and blank lines."""
    lines = [line.encode() for line in content.decode(tokenize.detect_encoding(io.BytesIO(content).readline)[0]).splitlines()]
    cuts: list[tuple[int, int, int, int]] = []
    in_string: set[int] = set()
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            in_string.update(range(node.lineno, node.end_lineno or node.lineno))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body and ast.get_docstring(node, clean=False) is not None:
            doc = node.body[0]
            cuts.append((doc.lineno, doc.col_offset, doc.end_lineno or doc.lineno, doc.end_col_offset or 0))
    for token in tokenize.tokenize(io.BytesIO(content).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            start = len(token.line[:column].encode())
            cuts.append((row, start, row, start + len(token.string.encode())))
    for row, start, last, end in sorted(cuts, reverse=True):
        lines[row - 1 : last] = [lines[row - 1][:start] + lines[last - 1][end:], *([b""] * (last - row))]
        in_string.difference_update(range(row, last))
    kept = [line.decode() if number in in_string else line.decode().rstrip() for number, line in enumerate(lines, 1) if line.strip() or number in in_string]
    return "\n".join(kept)


def _first(error: ValidationError, section: str) -> str:
    problem = error.errors()[0]
    option = ".".join(str(part) for part in (section, *problem["loc"]))
    context = problem.get("ctx", {})
    if option.endswith(".rate") and problem["type"] in ("less_than_equal", "greater_than_equal"):
        return f"expected {option} in [0, 0.5], got {problem['input']}. A rate is a fraction: 3 % is 0.03."
    if problem["type"] == "literal_error":
        guess = nearest(str(problem["input"]), [word.strip("'") for word in str(context["expected"]).replace(" or ", ", ").split(", ")])
        hint = f" Did you mean {guess!r}?" if guess else ""
        return f"expected {option} to be {context['expected']}, got {problem['input']!r}.{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    got = f", got {problem['input']!r}" if problem["loc"] else ""
    return f"{option}: {message[0].lower()}{message[1:]}{got}"


def _origins(kind: Kind) -> dict[str, list[str]]:
    package = importlib.util.find_spec(_PACKAGE[kind])
    found: dict[str, list[str]] = {}
    for place in (package.submodule_search_locations or []) if package else []:
        for file in sorted(Path(place).glob("*.py")):
            if not file.stem.startswith("_"):
                found.setdefault(file.stem, []).append(str(file))
    for entry in importlib.metadata.entry_points(group=_GROUP[kind]):
        values = found.setdefault(entry.name, [])
        if entry.value not in values:
            values.append(entry.value)
    return found


def _file_of_module(module: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise BenchError(f"the installed plugin module {module!r} cannot be found; reinstall its package")
    return Path(spec.origin)


def _load(kind: Kind, name: str, origin: str, by_path: bool) -> type[Any]:
    from benchmark.contract import Attack, Defense

    base = Attack if kind == "attack" else Defense
    if not origin.endswith(".py"):
        module, _, attribute = origin.partition(":")
        with _import_errors(module):
            imported = importlib.import_module(module)
        found = getattr(imported, attribute, None)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise BenchError(f"{origin} is not a subclass of benchmark.contract.{base.__name__}")
        return found
    module_name = f"bench_plugin_{hashlib.sha256(origin.encode()).hexdigest()[:8]}_{name}" if by_path else f"{_PACKAGE[kind]}.{name}"
    with _import_errors(origin):
        imported = _import_file(Path(origin), module_name) if by_path else importlib.import_module(module_name)
    classes = [
        value for value in vars(imported).values() if isinstance(value, type) and issubclass(value, base) and value.__module__ == module_name and not value.__name__.startswith("_")
    ]
    if len(classes) != 1:
        listed = ", ".join(cls.__name__ for cls in classes) or "none"
        raise BenchError(f"{origin} must define exactly one {base.__name__}, found {len(classes)}: {listed}. Start the names of helper classes with '_'")
    return classes[0]


def _import_file(file: Path, module_name: str) -> Any:
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, str(file.parent))  # so that it finds modules beside it
    for beside in source_files(file):
        if beside.parent == file.parent:
            sys.modules.pop(beside.stem, None)  # of another folder, or read before it was edited
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    finally:
        sys.path.remove(str(file.parent))
    return module


@contextlib.contextmanager
def _import_errors(origin: str) -> Iterator[None]:
    try:
        yield
    except SyntaxError as error:
        raise BenchError(f"{error.filename or origin} line {error.lineno}: {error.msg}") from None
    except BenchError:
        raise
    except Exception as error:
        raise BenchError(f"{origin} cannot be imported: {type(error).__name__}: {error}") from None


def _sources(file: Path, seen: set[Path]) -> set[Path]:
    if file in seen or not file.is_file():
        return seen
    seen.add(file)
    try:
        imported = _imported(file.read_bytes())
    except SyntaxError as error:
        raise BenchError(f"{file} line {error.lineno}: {error.msg}") from None
    except ValueError as error:
        raise BenchError(f"{file}: {error}") from None
    alone = not (file.parent / "__init__.py").is_file()
    for module, level in imported:
        package, _, last = module.rpartition(".")
        if package in (*_PACKAGE.values(), _SCORES) or (last.startswith("_") and not last.startswith("__")):
            beside = file.parents[max(level, 1) - 1]
            spec_file = _module_file("", last, beside.joinpath(*package.split("."))) if level else _module_file(package, last, beside)
            if spec_file is not None:
                _sources(spec_file, seen)
        elif alone and not package and last not in sys.stdlib_module_names:
            _sources(file.with_name(f"{last}.py"), seen)
    return seen


@cache
def _imported(content: bytes) -> tuple[tuple[str, int], ...]:
    """What a file's content imports, or may import as `from package import module`, and the number of dots before it."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module else ""
            found += [(module, node.level) for module in (*([node.module] if node.module else []), *(f"{prefix}{alias.name}" for alias in node.names))]
        elif isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
    return tuple(found)


def _module_file(package: str, last: str, beside: Path) -> Path | None:
    if not package:
        candidate = beside / f"{last}.py"
        return candidate if candidate.is_file() else None
    top = importlib.util.find_spec(package.partition(".")[0])
    for place in (top.submodule_search_locations or []) if top else []:
        candidate = Path(place).joinpath(*package.split(".")[1:], f"{last}.py")
        if candidate.is_file():
            return candidate
    return None
