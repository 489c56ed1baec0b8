import re
from pathlib import Path

import pytest

from benchmark import matrix
from benchmark.errors import BenchError
from benchmark.request import Request, plan
from benchmark.train.synonyms import WORDNET_VARIABLE, from_table, read_table, resolve, stamped, wordnet, wordnet_folder

LICENCE = "  1 made up for this test\n"


@pytest.fixture
def folder(tmp_path):
    """Two synsets of boat (noun), one of sail (verb), one satellite adjective, in the format of wndb(5WN)."""
    lines = {
        "noun": ["06 n 02 boat 0 steam-boat 0 000 | a thing\n", "06 n 03 boat 0 gravy_boat 0 Sauce_Boat 1 000 | a dish\n"],
        "verb": ["38 v 02 sail 0 boat 0 000 01 + 02 00 | to move\n"],
        "adj": ["00 s 02 afloat(p) 0 aground(a) 0 000 | there\n"],
        "adv": [],
    }
    entries = {"noun": {"boat": (0, 1), "gravy_boat": (1,)}, "verb": {"boat": (0,), "sail": (0,)}, "adj": {"afloat": (0,)}, "adv": {}}
    for part, synsets in lines.items():
        text, offsets = LICENCE, []
        for line in synsets:
            offsets.append(len(text))
            text += f"{len(text):08d} {line}"
        (tmp_path / f"data.{part}").write_text(text)
        index = "".join(f"{word} {part[0]} {len(rows)} 0 {len(rows)} 0 {' '.join(f'{offsets[row]:08d}' for row in rows)}  \n" for word, rows in entries[part].items())
        (tmp_path / f"index.{part}").write_text(LICENCE + index)
    return tmp_path


def test_a_word_has_the_lemmas_of_all_its_synsets_and_parts_of_speech(folder):
    look_up = wordnet(folder)
    assert look_up("boat") == ("gravy boat", "sail", "sauce boat", "steam boat")
    assert look_up("sail") == ("boat",)
    assert look_up("nothing") == ()


def test_the_marker_of_an_adjective_is_no_part_of_the_word(folder):
    assert wordnet(folder)("afloat") == ("aground",)


@pytest.mark.parametrize("name", ["data.verb", "index.adv"])
def test_a_folder_without_one_of_the_files_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(BenchError, match=f"has no {name}"):
        wordnet(folder)


def test_the_variable_names_the_folder(folder, monkeypatch):
    monkeypatch.setenv(WORDNET_VARIABLE, str(folder))
    assert wordnet_folder() == folder
    name, look_up = resolve("wordnet", {})
    assert name == "wordnet" and look_up("sail") == ("boat",)


def test_no_folder_is_an_error_with_its_remedies(tmp_path, monkeypatch):
    monkeypatch.setenv(WORDNET_VARIABLE, str(tmp_path))
    for setting in ("auto", "wordnet"):
        with pytest.raises(BenchError, match=r"wordnet-base.*BENCH_WORDNET.*augment.synonyms=none"):
            resolve(setting, {})


def test_auto_takes_the_datas_own_table():
    name, look_up = resolve("auto", {"boat": ("ship",)})
    assert name == "built-in" and look_up("ship") == ("boat",)


def test_none_means_none_and_a_misspelt_source_is_refused():
    assert resolve("none", {"boat": ("ship",)}) == ("none", None)
    with pytest.raises(BenchError, match="auto, wordnet, table:FILE or none, got 'nltk'"):
        resolve("nltk", {})


def test_a_table_reads_both_ways_and_is_sorted():
    look_up = from_table({"small": ("tiny", "little")})
    assert look_up("small") == ("little", "tiny") and look_up("tiny") == ("little", "small")


def test_a_users_table_is_read_and_a_broken_line_named(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("boat\tship, vessel\n\ncup\tmug\n")
    assert read_table(path) == {"boat": ("ship", "vessel"), "cup": ("mug",)}
    name, look_up = resolve(f"table:{path}", {})
    assert re.fullmatch(r"table:words\.tsv@[0-9a-f]{16}", name) and look_up("mug") == ("cup",)
    path.write_text("boat\tship\ncup mug\n")
    with pytest.raises(BenchError, match="line 2"):
        read_table(path)
    with pytest.raises(BenchError, match="no table at"):
        resolve(f"table:{tmp_path}/missing.tsv", {})


def test_an_edited_table_is_another_run(tmp_path):
    def run_id(setting):
        (asked,) = plan(Request(attacks=("none",), defenses=("clip+aug",), sets=(f"augment.synonyms={setting}",), baseline=False))
        return matrix.resolve(asked).settings.run_id

    path = tmp_path / "words@home.txt"
    path.write_text("boat\tship\n")
    before, name = run_id(f"table:{path}"), stamped(f"table:{path}")
    assert run_id(name) == before, "a record's own setting asks for the same run"
    assert resolve(name, {})[0] == resolve(f"table:{path}", {})[0]
    path.write_text("boat\tferry\n")
    assert run_id(f"table:{path}") != before
    with pytest.raises(BenchError, match=r"has other content than [0-9a-f]{16}; leave @"):
        run_id(name)
    with pytest.raises(BenchError, match="no table at"):
        run_id(f"table:{tmp_path}/none.txt")
    assert [stamped(setting) for setting in ("auto", "none")] == ["auto", "none"]


def test_the_installed_wordnet_knows_a_boat():
    place = Path("/usr/share/wordnet")
    if not (place / "index.noun").is_file():
        pytest.skip("no WordNet in /usr/share/wordnet (Debian: wordnet-base)")
    look_up = wordnet(place)
    assert "gravy boat" in look_up("boat") and "dog" not in look_up("dog")
    assert look_up("qwertyuiop") == ()
