"""Where synonyms come from: the drawn world's table, a user's table, or the files of a WordNet dict folder."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from benchmark.errors import BenchError
from benchmark.train.eda import Synonyms

WORDNET_VARIABLE = "BENCH_WORDNET"
_WORDNET_PLACES = ("/usr/share/wordnet", "/usr/share/wordnet/dict", "/usr/local/WordNet-3.0/dict")
_PARTS = ("noun", "verb", "adj", "adv")
_TABLE = re.compile(r"table:(?P<file>.+?)(@(?P<content>[0-9a-f]{16}))?")


def resolve(setting: str, built_in: Mapping[str, tuple[str, ...]]) -> tuple[str, Synonyms | None]:
    """The name of the source in use, and the look-up; None for no synonyms.

    Args:
        setting: `auto` (the data's own table, else WordNet), `wordnet`, `table:FILE` or `none`.
        built_in: the data's own table; empty where it has none.
    """
    if setting == "none":
        return "none", None
    if setting == "auto" and built_in:
        return "built-in", from_table(built_in)
    if setting.startswith("table:"):
        setting, path = _table(setting)
        return f"table:{path.name}{setting[-17:]}", from_table(read_table(path))
    if setting in ("auto", "wordnet"):
        folder = wordnet_folder()
        if folder is None:
            raise BenchError(
                f"augment.synonyms is {setting!r} and no WordNet dict folder was found. Install one (Debian: wordnet-base), "
                f"name it in the variable {WORDNET_VARIABLE}, or go without: --set augment.synonyms=none"
            )
        return "wordnet", wordnet(folder)
    raise BenchError(f"augment.synonyms must be auto, wordnet, table:FILE or none, got {setting!r}")


def stamped(setting: str) -> str:
    """The setting with the content of a table behind it, `table:FILE@HASH`, so that an edited table is another run; others as they are.

    Raises:
        BenchError: no such file, or a hash that is not the file's.
    """
    return _table(setting)[0] if setting.startswith("table:") else setting


def _table(setting: str) -> tuple[str, Path]:
    found = _TABLE.fullmatch(setting)
    path = Path(found["file"] if found else "")
    if found is None or not path.is_file():
        raise BenchError(f"augment.synonyms: no table at {path}")
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    if found["content"] not in (None, content):
        raise BenchError(f"augment.synonyms: the table {path} has other content than {found['content']}; leave @{found['content']} out to take it as it is")
    return f"table:{path}@{content}", path


def from_table(table: Mapping[str, tuple[str, ...]]) -> Synonyms:
    """Look-up in a table, both ways: words that share an entry are each other's synonyms."""
    groups: dict[str, set[str]] = {}
    for word, others in table.items():
        group = {word, *others}
        for member in group:
            groups.setdefault(member, set()).update(group)
    ready = {word: tuple(sorted(group - {word})) for word, group in groups.items()}
    return lambda word: ready.get(word, ())


def read_table(path: Path) -> dict[str, tuple[str, ...]]:
    """A file of `word<TAB>synonym,synonym` lines."""
    table = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        word, tab, others = line.partition("\t")
        if not tab:
            raise BenchError(f"{path} line {number}: expected word<TAB>synonym,synonym, got {line[:60]!r}")
        table[word.strip()] = tuple(other.strip() for other in others.split(",") if other.strip())
    return table


def wordnet_folder() -> Path | None:
    """The configured WordNet dict folder, or one in a usual place."""
    places = [os.environ[WORDNET_VARIABLE]] if os.environ.get(WORDNET_VARIABLE) else list(_WORDNET_PLACES)
    for place in places:
        if (Path(place) / "index.noun").is_file():
            return Path(place)
    return None


def wordnet(folder: Path) -> Synonyms:
    """All lemmas of all synsets of a word, from `index.*` and `data.*` (wndb(5WN)); sorted, the word itself left out."""
    indexes = {part: _read_index(_file_of(folder, f"index.{part}")) for part in _PARTS}
    data = {part: _file_of(folder, f"data.{part}").read_bytes() for part in _PARTS}

    @functools.lru_cache(maxsize=100_000)
    def look_up(word: str) -> tuple[str, ...]:
        found: set[str] = set()
        for part in _PARTS:
            for offset in indexes[part].get(word, ()):
                found.update(_lemmas(data[part], offset))
        return tuple(sorted(found - {word, ""}))

    return look_up


def _file_of(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise BenchError(f"the WordNet folder {folder} has no {name}; install it again (Debian: wordnet-base) or use --set augment.synonyms=none")
    return path


def _read_index(path: Path) -> dict[str, tuple[int, ...]]:
    index = {}
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith(" "):
            continue
        fields = line.split()
        n_synsets = int(fields[2])
        index[fields[0]] = tuple(int(offset) for offset in fields[-n_synsets:])
    return index


def _lemmas(data: bytes, offset: int) -> list[str]:
    fields = data[offset : data.index(b"\n", offset)].decode("ascii").split()
    n_words = int(fields[3], 16)
    lemmas = (re.sub(r"\([a-z]+\)$", "", fields[4 + 2 * index]) for index in range(n_words))
    return [" ".join(re.sub(r"[^a-z ]", "", lemma.replace("_", " ").replace("-", " ").lower()).split()) for lemma in lemmas]
