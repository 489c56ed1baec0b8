"""Plugins: found by name, entry point or file, and named precisely when they are not."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.contract import Attack, Defense
from benchmark.errors import BenchError
from benchmark.registry import configure, find, names, source_hash
from benchmark.settings import SCALES

MINE = """
from benchmark.contract import Defense, Field

class Mine(Defense):
    strength: float = Field(1.0, ge=0, description="How much.")
"""


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def refusal(kind: str, name: str, load: bool = False) -> str:
    with pytest.raises(BenchError) as caught:
        plugin = find(kind, name)  # type: ignore[arg-type]
        if load:
            plugin.load()
    return str(caught.value)


@pytest.mark.parametrize(("kind", "base"), [("attack", Attack), ("defense", Defense)])
def test_every_plugin_loads_and_tells_its_options_with_a_description(kind: str, base: type) -> None:
    for name in names(kind):  # type: ignore[arg-type]
        cls = find(kind, name).load()  # type: ignore[arg-type]
        assert issubclass(cls, base)
        assert all(field.description for field in cls.model_fields.values()), name
        assert cls.__doc__ and "Source:" in cls.__doc__ and "Differs from the paper:" in cls.__doc__


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known() -> None:
    message = refusal("defense", "rocilp")
    assert message.startswith("unknown defense 'rocilp'. Did you mean 'roclip'? Known defenses: abl, ")
    assert refusal("attack", "zzz").startswith("unknown attack 'zzz'. Known attacks: all_to_all, backdoor, badclip, ")


def test_a_plugin_in_a_file_is_loaded_by_its_path(tmp_path: Path) -> None:
    plugin = find("defense", write(tmp_path, "mine.py", MINE))
    assert (plugin.name, plugin.by_path) == ("mine", True)
    assert configure(plugin, {}, {"strength": 2.0}).strength == 2.0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (MINE + "class Other(Defense):\n    pass\n", "must define exactly one Defense, found 2: Mine, Other. Start the names of helper classes with '_'"),
        ("x = 1\n", "must define exactly one Defense, found 0: none"),
        ("x = 1\ndef f(:\n", "line 2: invalid syntax"),
        ("import not_there\n", "cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
        ("1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_is_no_plugin_is_answered_with_what_is_wrong(tmp_path: Path, text: str, sentence: str) -> None:
    path = write(tmp_path, "mine.py", text)
    message = refusal("defense", path, load=True)
    assert sentence in message
    assert path in message


def test_a_missing_file_is_named() -> None:
    assert refusal("defense", "./none.py") == "no defense file at ./none.py"


def test_imported_classes_and_helpers_are_not_taken_for_the_plugin(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.py", "from defenses.roclip import *\n" + MINE + "class _Helper(Mine):\n    pass\n")
    assert find("defense", path).load().__name__ == "Mine"


def test_a_module_beside_the_file_is_found_and_belongs_to_its_source(tmp_path: Path) -> None:
    write(tmp_path, "_mine_helper.py", "from _mine_deeper import X\n")
    write(tmp_path, "_mine_deeper.py", "X = 1\n")
    path = write(tmp_path, "mine.py", "from _mine_helper import X\n" + MINE)
    before = find("defense", path)
    before.load()
    assert str(tmp_path) not in sys.path
    write(tmp_path, "_mine_deeper.py", "X = 2\n")
    assert find("defense", path).source != before.source


@pytest.mark.parametrize("helper", ["_beside", "beside"])
def test_the_module_beside_the_file_is_the_one_that_runs(tmp_path: Path, helper: str) -> None:
    """Not that of another folder, nor what it was before it was edited: what is hashed is what runs."""
    text = f"from {helper} import X\n{MINE}    def describe(self): return X\n"
    paths = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, f"{helper}.py", f"X = {folder!r}\n")
        paths.append(write(tmp_path / folder, "mine.py", text))
    plugins = [find("defense", path) for path in paths]
    assert [plugin.load()().describe() for plugin in (*plugins, *plugins)] == ["one", "two", "one", "two"]
    write(tmp_path / "one", f"{helper}.py", "X = 'edited'\n")
    again = find("defense", paths[0])
    assert again.source != plugins[0].source
    assert again.load()().describe() == "edited"


def test_a_file_beside_with_a_name_of_the_standard_library_is_not_meant(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.py", "import random\n" + MINE)
    before = find("defense", path).source
    write(tmp_path, "random.py", "X = 1\n")
    assert find("defense", path).source == before


@pytest.mark.parametrize("line", ["from ._part import X", "from . import _part", "from .inner._deep import X", "import _part", "from .inner import _deep"])
def test_the_source_hash_follows_every_way_to_import_a_private_module(tmp_path: Path, line: str) -> None:
    (tmp_path / "inner").mkdir()
    file = Path(write(tmp_path, "plugin.py", line + "\n"))
    for name in ("_part.py", "inner/_deep.py"):
        write(tmp_path, name, "X = 1\n")
    before = source_hash(file)
    for name in ("_part.py", "inner/_deep.py"):
        write(tmp_path, name, "X = 2\n")
    assert source_hash(file) != before


def test_the_source_hash_does_not_follow_public_modules_or_place(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    hashes = {source_hash(Path(write(tmp_path, name, MINE))) for name in ("one.py", "elsewhere/two.py")}
    assert len(hashes) == 1


class Installed(Defense):
    """Stands in for a plugin of another package."""


def install(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str]) -> None:
    found = [importlib.metadata.EntryPoint(name, value, "bench.defenses") for name, value in entries]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry for entry in found if entry.group == group])


def test_an_installed_plugin_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ("theirs", f"{__name__}:Installed"))
    assert "theirs" in names("defense")
    assert find("defense", "theirs").load() is Installed
    assert find("defense", "theirs").file == Path(__file__)


def test_two_plugins_of_one_name_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ("clip", "theirs:Clip"))
    message = refusal("defense", "clip")
    assert message.startswith("two defenses are named 'clip': ")
    assert "clip.py and theirs:Clip" in message


def test_an_entry_point_that_is_listed_twice_is_one_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *[("theirs", f"{__name__}:Installed")] * 2)
    assert find("defense", "theirs").load() is Installed


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("not_there.at_all:X", "the installed plugin module 'not_there.at_all' cannot be found"),
        ("json:JSONDecoder", "json:JSONDecoder is not a subclass of benchmark.contract.Defense"),
        ("json:nothing", "is not a subclass"),
    ],
)
def test_a_broken_entry_point_is_named(monkeypatch: pytest.MonkeyPatch, value: str, sentence: str) -> None:
    install(monkeypatch, ("theirs", value))
    assert sentence in refusal("defense", "theirs", load=True)


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("backdoor", {"rat": 0.1}, "unknown option attack.rat. Did you mean 'rate'? Options of backdoor: "),
        ("none", {"rate": 0.1}, "unknown option attack.rate. none has no options."),
        ("backdoor", {"rate": 3.0}, "expected attack.rate in [0, 0.5], got 3.0. A rate is a fraction: 3 % is 0.03."),
        ("backdoor", {"trigger": "cheker"}, "Did you mean 'checker'?"),
        (
            "backdoor",
            {"place": "left"},
            "attack.place: a place is corner, corner:tl (tr, bl, br; a margin after a comma), centre, random, inner:LO,HI in shares of the side, or at:Y,X, got 'left'",
        ),
        ("backdoor", {"rate": None}, "attack: one of rate and count is needed"),
        ("targeted", {"preset": "carlini2021"}, "unknown targeted preset 'carlini2021'. Did you mean 'carlini2022'?"),
        ("targeted", {"n_targets": 0}, "attack.n_targets: input should be greater than or equal to 1, got 0"),
    ],
)
def test_a_wrong_option_is_answered_with_what_is_allowed(name: str, given: dict[str, object], sentence: str) -> None:
    with pytest.raises(BenchError) as caught:
        configure(find("attack", name), {}, given)
    assert str(caught.value).startswith(sentence) or sentence in str(caught.value)


def test_later_sources_of_options_win() -> None:
    plugin = find("attack", "targeted")
    assert configure(plugin, {"n_targets": 4}, {}).n_targets == 4
    assert configure(plugin, {"n_targets": 4}, {"preset": "carlini2022"}).n_targets == 1
    assert configure(plugin, {"n_targets": 4}, {"preset": "carlini2022", "n_targets": 2}).n_targets == 2


# What a preset leaves to the scale. Clean pairs are what the data have. Attacks: a preset names a trigger, and sizes in pixels are the scale's;
# a true caption is what the drawn captions can say, and `smoke` has fewer rows than a paper's counts.
LEFT_TO_SCALES = {
    ("defense", "cleanclip"): {"n_clean"},
    ("defense", "par"): {"n_clean"},
    ("defense", "roclip"): {"first_matched_epoch"},  # a model that has learned nothing yet collapses when it is matched
    ("attack", "targeted"): {"captions_per_target"},  # of no effect beside the rate that some presets give
    ("attack", "backdoor"): {"rate", "size", "cell"},
    ("attack", "corrupt_encoder"): {"caption", "n_support_references"},
    ("attack", "noisy_alignment"): {"caption"},
    ("attack", "toxic_text"): {"n_images", "count", "n_targets", "captions_per_target"},
}


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_a_preset_gives_the_same_options_at_every_scale(kind: str) -> None:
    for name in names(kind):  # type: ignore[arg-type]
        plugin = find(kind, name)  # type: ignore[arg-type]
        differ = set()
        for preset in set(plugin.load().presets) - {"default"}:
            at = [configure(plugin, scale.options.get(name, {}), {"preset": preset}).model_dump() for scale in SCALES.values()]
            differ |= {option for option in at[0] if any(one[option] != at[0][option] for one in at)}
        assert differ == LEFT_TO_SCALES.get((kind, name), set()), name


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_the_official_preset_of_safeclip_is_the_released_code_at_every_scale(scale: str) -> None:
    official = configure(find("defense", "safeclip"), SCALES[scale].options.get("safeclip", {}), {"preset": "official"})
    assert (official.unimodal_epochs, official.cross_warmup_epochs, official.first_share, official.safe_growth) == (5, 1, None, 0.01)
    assert (official.filter_lr, official.in_lr, official.cross_lr) == (5e-6, 5e-4, 5e-4)


def test_a_file_named_like_a_plugin_is_not_given_options_that_it_lacks(tmp_path: Path) -> None:
    plugin = find("defense", write(tmp_path, "roclip.py", MINE))
    assert configure(plugin, {"pool_fraction": 0.08, "strength": 3.0}, {}).model_dump() == {"strength": 3.0}


def test_names_are_found_without_importing_torch_or_a_plugin() -> None:
    code = "import sys; from benchmark.registry import names, find; names('defense'); find('attack', 'backdoor'); print(*[m for m in ('torch', 'open_clip', 'attacks.backdoor') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout.strip() == ""


def test_comments_docstrings_and_blank_lines_train_nothing_anew(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('"""One."""\n\nX = 1  # why\n\n\ndef f():\n    """Says little."""\n    return """a\n\nb"""\n')
    first = source_hash(file)
    file.write_text('"""Another\n\nlonger text."""\nX = 1\n# a remark\ndef f():\n    """Says more.\n\n    And more.\n    """\n\n    return """a\n\nb"""\n')
    assert source_hash(file) == first
    for change in (("X = 1", "X = 2"), ("a\n\nb", "a\nb"), ("a\n\nb", "a # \n\nb")):
        text = file.read_text()
        file.write_text(text.replace(*change))
        assert source_hash(file) != first
        file.write_text(text)
