"""Prompt templates and class lists: from files that are read and never run, or from open_clip."""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Iterable
from pathlib import Path

from benchmark.errors import BenchError

GENERIC = ("a photo of a {c}", "a picture of a {c}", "{c}")
_LIMIT = 1 << 20


def chosen(templates: str) -> tuple[str, ...] | None:
    """The prompts that `--templates` names; None for those of the set itself.

    Args:
        templates: `set`, `openai` (the 80 of open_clip), or a file with one prompt a line.
    """
    if templates == "set":
        return None
    if templates == "openai":
        return openai_templates()
    path = Path(templates)
    if not path.is_file():
        raise BenchError(f"no file of templates at {templates!r}; --templates takes set, openai, or a file with one prompt a line and {{c}} where the class name goes")
    found = template_lines(read_text(path), path)
    if not found:
        raise BenchError(f"{path} holds no template; expected one prompt a line with {{c}} where the class name goes")
    return found


def template_lines(text: str, path: Path) -> tuple[str, ...]:
    """The prompts of a text, one a line; `{}` means the same as `{c}`."""
    lines = [line for line in text.splitlines() if line.strip()]
    return tuple(_normalised(line, path) for line in lines)


def read_text(path: Path, limit: int = _LIMIT) -> str:
    """The text of a UTF-8 file of at most `limit` bytes."""
    try:
        if path.stat().st_size > limit:
            raise BenchError(f"{path} has {path.stat().st_size} bytes; at most {limit} are read of such a list")
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise BenchError(f"no file at {path}") from None
    except UnicodeDecodeError:
        raise BenchError(f"{path} is not UTF-8; save the file as UTF-8") from None


@functools.cache
def openai_templates() -> tuple[str, ...]:
    """OpenAI's 80 prompts for ImageNet, as open_clip has them."""
    import open_clip

    return tuple(template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


@functools.cache
def imagenet_names() -> dict[str, str]:
    """OpenAI's display names of the 1,000 ImageNet classes, by WordNet id.

    open_clip has them in the order of the ids, which timm has in the same order; a test holds the two lists against the
    words of WordNet.
    """
    import open_clip
    from timm.data.imagenet_info import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), open_clip.IMAGENET_CLASSNAMES, strict=True))


@functools.cache
def imagenet_words() -> dict[str, tuple[str, ...]]:
    """WordNet's words for the 1,000 ImageNet classes, by WordNet id."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return {name: tuple(info.label_name_to_description(name).split(", ")) for name in info.label_names()}


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names and templates of a `classes.py` of the CyCLIP family, parsed and never run.

    The file is one dictionary: `classes` is a list of strings, `templates` a list of lambdas of one argument over an
    f-string that holds that argument and constant text.

    Raises:
        BenchError: anything else, with its line and column.
    """
    text = read_text(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text.lstrip(" \t"), str(path), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BenchError(f"{path} is not one dictionary of classes and templates: {error}; the file is read, not run") from None
    if not isinstance(body, ast.Dict) or not all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in body.keys):
        raise _refused(path, body, "a dictionary with the keys 'classes' and 'templates'")
    found = {key.value: value for key, value in zip(body.keys, body.values, strict=True) if isinstance(key, ast.Constant)}
    missing = [name for name in ("classes", "templates") if name not in found]
    if missing:
        raise BenchError(f"{path} has no {missing[0]!r}; expected a dictionary with the keys 'classes' and 'templates'")
    classes = [_constant(path, node) for node in _list(path, found["classes"])]
    templates = [_template(path, node) for node in _list(path, found["templates"])]
    if not classes or not templates:
        raise BenchError(f"{path}: 'classes' and 'templates' must not be empty")
    return tuple(classes), tuple(templates)


def _normalised(template: str, path: Path) -> str:
    found = template if "{c}" in template else template.replace("{}", "{c}")
    if "{c}" not in found:
        raise BenchError(f"{path}: {template!r} has no {{c}} where the class name goes")
    return found


def _list(path: Path, node: ast.expr) -> Iterable[ast.expr]:
    if not isinstance(node, ast.List | ast.Tuple):
        raise _refused(path, node, "a list")
    return node.elts


def _constant(path: Path, node: ast.expr) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise _refused(path, node, "a string")
    return node.value


def _template(path: Path, node: ast.expr) -> str:
    """`lambda c: f"a photo of a {c}."` as `a photo of a {c}.`."""
    expected = 'a template like lambda c: f"a photo of a {c}."'
    if not isinstance(node, ast.Lambda) or not isinstance(node.body, ast.JoinedStr):
        raise _refused(path, node, expected)
    given = node.args
    if len(given.args) != 1 or given.posonlyargs or given.vararg or given.kwonlyargs or given.kwarg or given.defaults:
        raise _refused(path, node, expected)
    parts = []
    for part in node.body.values:
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and "{" not in part.value:
            parts.append(part.value)
        elif (
            isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name) and part.value.id == given.args[0].arg and part.conversion == -1 and part.format_spec is None
        ):
            parts.append("{c}")
        else:
            raise _refused(path, node, expected)
    if "{c}" not in parts:
        raise _refused(path, node, expected)
    return "".join(parts)


def _refused(path: Path, node: ast.AST, expected: str) -> BenchError:
    return BenchError(f"{path} line {getattr(node, 'lineno', 1)} column {getattr(node, 'col_offset', 0) + 1}: expected {expected}; the file is read, not run")
