import random
from collections import Counter

import numpy as np
import pytest
import torch

from benchmark.seeding import generator
from benchmark.train.eda import STOP_WORDS, Eda, clean

CAPTION = "alpha bravo charlie delta echo foxtrot golf hotel"


def operation_of(before: str, after: str) -> str:
    """Which operation acted, with a table that gives every word the synonym `zz`."""
    old, new = before.split(), after.split()
    if "zz" in new:
        return "replace" if len(new) == len(old) else "insert"
    return "delete" if len(new) < len(old) else "swap" if new != old else "same"


def test_each_operation_acts_a_quarter_of_the_time():
    eda = Eda(lambda word: ("zz",))
    found = Counter(operation_of(CAPTION, eda.rewrite(CAPTION, generator("t", index))) for index in range(4000))
    # Deletion leaves a caption of eight words as it is with probability 0.9 ** 8, a swap with 1 / 8 ** 3.
    for name, expected in {"replace": 0.25, "insert": 0.25, "swap": 0.25, "delete": 0.25 * (1 - 0.9**8)}.items():
        assert found[name] / 4000 == pytest.approx(expected, abs=0.03)
    assert eda.operations == "sr,ri,rs,rd"


def test_without_synonyms_swap_and_deletion_share():
    eda = Eda(None)
    found = Counter(operation_of(CAPTION, eda.rewrite(CAPTION, generator("t", index))) for index in range(4000))
    assert found["swap"] / 4000 == pytest.approx(0.5, abs=0.03)
    assert found["delete"] / 4000 == pytest.approx(0.5 * (1 - 0.9**8), abs=0.03)
    assert eda.operations == "rs,rd"


def test_a_replaced_word_is_replaced_everywhere_and_stop_words_never():
    eda = Eda(lambda word: ("zz",))
    for index in range(200):
        after = eda.rewrite("the boat and the boat", generator("t", index)).split()
        if after.count("zz") and len(after) == 5:
            assert after == ["the", "zz", "and", "the", "zz"]


def test_insertion_draws_uniformly_or_takes_the_first():
    for insertion, expected in (("first", {"b"}), ("uniform", {"b", "c"})):
        eda = Eda(lambda word: ("b", "c") if word == "a" else (), insertion)
        drawn = {word for index in range(200) for word in eda._insert(["a", "x"], generator(index)) if word in ("b", "c")}
        assert drawn == expected


def test_insertion_never_comes_after_the_last_word():
    eda = Eda(lambda word: ("zz",))
    assert all(eda._insert(["a", "b", "c"], generator(index))[-1] == "c" for index in range(200))


@pytest.mark.parametrize("caption", ["", "123 !!", "🚤 ⛵", "   "])
def test_a_caption_without_a_letter_comes_back_as_it_is(caption):
    assert Eda(lambda word: ("zz",)).rewrite(caption, generator(0)) == caption


@pytest.mark.parametrize("caption", ["word", "the of and", "word " * 100, "don’t won't", "naïve café", "a-b\tc\nd"])
@pytest.mark.parametrize("synonyms", [None, lambda word: (), lambda word: ("two words",)])
def test_odd_captions_are_rewritten_without_an_exception(caption, synonyms):
    eda = Eda(synonyms)
    for index in range(50):
        after = eda.rewrite(caption, generator(index))
        assert after and clean(after) == after
        assert eda.rewrite(caption, generator(index)) == after


def test_one_word_is_never_deleted():
    assert all(Eda(None).rewrite("word", generator(index)) == "word" for index in range(100))


def test_cleaning_keeps_letters_and_single_spaces():
    assert clean("It’s a 'Boat'-house,\n 3 of them!") == "its a boat house of them"


def test_global_generators_are_left_alone():
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    Eda(lambda word: ("zz",)).rewrite(CAPTION, generator(0))
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tobytes()) and torch.equal(before[2], torch.get_rng_state())


def test_stop_words_are_function_words_in_lower_case():
    assert {"the", "of", "", "yourselves"} <= STOP_WORDS and "boat" not in STOP_WORDS
    assert all(word == clean(word) for word in STOP_WORDS)
