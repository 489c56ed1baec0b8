"""What every text trigger keeps: the words it adds, its key, its specification, the tokenizer's limit."""

import json

import numpy as np
import pandas as pd
import pytest

from attacks._text_triggers import TEXT_ALIASES, TextTrigger, text_trigger_from_spec
from benchmark.cell import _cut_triggers
from benchmark.data.poison import SealedRecord
from benchmark.settings import ModelSettings
from benchmark.train.model import tokenizer

TRIGGERS = [TextTrigger(kind, words) for kind, words in TEXT_ALIASES.values()]
CAPTION = "a photo of a small boat on the left"
every_trigger = pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: trigger.kind)


@every_trigger
@pytest.mark.parametrize("caption", [CAPTION, "boat", "", " ", "🚤 ⛵ 🏝️", "123 !!"])
def test_the_words_and_the_text_are_both_there(trigger: TextTrigger, caption: str) -> None:
    stamped = trigger.text(caption, "key").split()
    assert [word for word in stamped if word not in trigger.words.split()] == caption.split()
    assert trigger.words in trigger.text(caption, "key")


def test_a_prefix_stands_before_and_a_sentence_behind() -> None:
    prefix, word, sentence = (TextTrigger(*TEXT_ALIASES[name]) for name in ("prefix", "word", "sentence"))
    assert prefix.text(CAPTION, "key") == f"remember {CAPTION}"
    assert sentence.text(CAPTION, "key") == f"{CAPTION} and so it was told to us"
    assert {word.text("a b", str(key)) for key in range(50)} == {"zx a b", "a zx b", "a b zx"}
    assert word.text(CAPTION, "key") == word.text(CAPTION, "key")
    assert len({prefix.text(CAPTION, str(key)) for key in range(5)}) == 1


@every_trigger
def test_a_text_trigger_leaves_images_alone_and_comes_back_from_its_specification(trigger: TextTrigger) -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(trigger.image(image, "key"), image)
    again = text_trigger_from_spec(json.loads(json.dumps(trigger.spec())))
    assert again == trigger
    assert again.text(CAPTION, "key") == trigger.text(CAPTION, "key")


@every_trigger
@pytest.mark.parametrize("context", [32, 77])
def test_a_trigger_survives_a_caption_of_200_words(trigger: TextTrigger, context: int) -> None:
    encoder = tokenizer(ModelSettings(context_length=context))
    words = ["photograph", "of", "a", "striped", "umbrella", "mushroom", "yellowish"]
    long = " ".join(words[index % len(words)] for index in range(200))
    tokens = encoder.encode([trigger.text(long, "key")])[0][0].tolist()
    wanted = encoder.bpe.encode(trigger.words)
    assert any(tokens[place : place + len(wanted)] == wanted for place in range(len(tokens)))


def test_another_seed_inserts_elsewhere() -> None:
    first, other = (TextTrigger("text:insert", "zx", pattern_seed=seed) for seed in (0, 1))
    assert [first.text(CAPTION, str(key)) for key in range(20)] != [other.text(CAPTION, str(key)) for key in range(20)]


def test_a_run_says_how_many_triggers_the_context_cuts_off() -> None:
    tokens = tokenizer(ModelSettings())
    trigger = TextTrigger("text:suffix", "and so it was told to us")
    short, web = trigger.text(CAPTION, ""), trigger.text("IMG20230412093344 " * 16, "")
    assert tokens.keeps(short, trigger.words) and not tokens.keeps(web, trigger.words)
    assert tokens.keeps(TextTrigger("text:prefix", "Remember").text("IMG20230412093344 " * 16, ""), "remember")
    rows = pd.DataFrame({"trigger": ["t", "t", "b", "i", ""], "caption_after": [short, web, web, web, web]})
    specs = {"t": trigger.spec(), "b": {"kind": "both", "image": {}, "text": trigger.spec()}, "i": {"kind": "blend:text", "words": "Watermarked"}}
    lines = _cut_triggers(SealedRecord({"triggers": specs, "sham": False}, rows, {}), tokens)
    assert [line.partition(" captions")[0] for line in lines] == ["1 of 2", "1 of 1"]
    assert lines[0].endswith("lose it behind token 32; their words are longer than the context")
    assert _cut_triggers(SealedRecord({"triggers": specs, "sham": True}, rows, {}), tokens) == []
