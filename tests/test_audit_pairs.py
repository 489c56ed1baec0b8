"""The audit of pairs: planted clusters come first, captions are shown and not run, memory and time grow with the rows."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmark import cli
from benchmark.audit.captions import corpus, ngrams, repeated_captions, surprise
from benchmark.audit.same_images import repeated_images, same_images
from benchmark.audit.suspects import Suspect, ranked
from benchmark.audit.under_model import contradicting_words
from benchmark.data.poison import open_record
from benchmark.errors import BenchError
from benchmark.progress import silent

TINY = ("data.n_pairs=512", "data.n_held_out=64", "data.n_clean=64", "data.n_test=100", "data.n_probe=200")


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A drawn world with four poisoned targets of four captions each, poisoned and exported by the commands, with ids."""
    folder = tmp_path_factory.mktemp("audit")
    sets = [part for one in TINY for part in ("--set", one)]
    where = ["--results", folder / "r"]
    assert invoke("poison", "--attack", "targeted", "--scale", "smoke", *sets, "--out", folder / "made", *where).exit_code == 0
    for to in ("open_clip", "webdataset"):
        assert invoke("export", folder / "made", "--to", to, "--out", folder / to, "--with-ids", *where).exit_code == 0
    return folder


@pytest.mark.parametrize("layout", ["open_clip", "webdataset"])
def test_the_planted_clusters_of_a_poisoned_export_are_among_the_first_twenty_suspects(exported, layout):
    out = exported / f"out-{layout}"
    result = invoke("audit", "--data", exported / layout, "--out", out)
    assert result.exit_code == 0 and "repeated_image" in result.output
    record = open_record(exported / "made" / "poisoned.record")
    planted = {frozenset(of_target["caption_after"]) for _, of_target in record.rows.groupby("target")}
    found = {}
    for row in rows_of(out / "rows.csv"):
        if int(row["rank"]) <= 20:
            found.setdefault(row["rank"], set()).add(row["caption"])
    assert len(planted) == 4 and planted <= set(map(frozenset, found.values()))
    about = json.loads((out / "suspects.json").read_text())
    assert about["n_pairs"] == 512 + 16 and [one["rank"] for one in about["suspects"]] == list(range(1, len(about["suspects"]) + 1))
    sheet = Image.open(out / "sheet.png")
    assert sheet.size[1] >= 20 * 96 and len(set(sheet.convert("L").resize((50, 50)).get_flattened_data())) > 5


def test_a_snapshot_of_this_program_adds_what_it_sees(exported, tmp_path):
    sets = [part for one in (*TINY, "train.epochs=1", "evaluation.linear_probe=none") for part in ("--set", one)]
    run = invoke("run", "--attack", "targeted", "--defense", "clip", "--scale", "smoke", *sets, "--results", exported / "r", "--jobs", "1", "--no-baseline", "--device", "cpu")
    assert run.exit_code == 0, run.output
    (snapshot,) = (exported / "r" / "cache" / "train").glob("*/epoch-*.safetensors")
    result = invoke("audit", "--data", exported / "open_clip", "--checkpoint", snapshot, "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    kinds = [row["kind"] for row in rows_of(tmp_path / "suspects.csv")]
    assert {"repeated_image", "ngram", "dissimilar", "outlier"} <= set(kinds)
    assert kinds.count("dissimilar") == kinds.count("outlier") > 5


def planted(n, seed=0):
    """Captions of three random words, and numbers of their images."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in rng.integers(60, size=3)) for _ in range(n)], np.arange(n)


def test_a_long_caption_on_many_images_is_more_surprising_than_a_short_one():
    captions, images = planted(600)
    captions[:8] = ["the birthday cake with candles in the form of a number"] * 8
    captions[100:112] = ["w7"] * 12
    captions[300:340] = [f"w7 w{one % 40}" for one in range(40)]
    captions[400:410] = ["one picture with one text"] * 10
    images[400:410] = 400
    read = corpus(captions, silent())
    first, second, *_ = repeated_captions(captions, read, images)
    assert first.rows.tolist() == list(range(8)) and (first.n_rows, first.n_images, first.n_captions) == (8, 8, 1)
    assert second.what == "w7" and first.score > second.score
    assert all("one picture" not in one.what for one in repeated_captions(captions, read, images)), "ten rows of one image are one image"


def test_captions_that_differ_in_case_and_blanks_alone_are_the_same():
    captions = ["A  birthday cake", "a birthday CAKE", "a birthday cake ", "something else"]
    assert len(set(corpus(captions, silent()).hashes.tolist())) == 2


def test_words_that_stand_together_come_first_and_once():
    captions, images = planted(600)
    for row in range(0, 600, 50):
        captions[row] += " presented by shutterstock"
    found = ngrams(corpus(captions, silent()), images, 20)
    assert found[0].what in ("presented by shutterstock", "presented by", "by shutterstock") and found[0].rows.tolist() == list(range(0, 600, 50))
    assert sum("shutterstock" in one.what or "presented" in one.what for one in found) == 1


def test_a_planted_phrase_in_captions_that_begin_alike_is_found_too():
    captions, images = planted(2000)
    captions[:600] = [f"a photo of a {caption}" for caption in captions[:600]]
    for row in range(0, 600, 20):
        captions[row] += " zx qv"
    found = {one.what: one for one in ngrams(corpus(captions, silent()), images, 20)}
    assert found["zx qv"].rows.tolist() == list(range(0, 600, 20))
    assert sum("photo" in what for what in found) == 1, "parts of one phrase are one suspect"


def test_a_repeated_caption_is_found_among_many_that_are_repeated_more_often():
    captions = [f"w{word}" for word in range(5001) for _ in range(4)] + ["the birthday cake with candles in the form of a number"] * 3
    first = next(repeated_captions(captions, corpus(captions, silent()), np.arange(len(captions))))
    assert first.what.startswith("the birthday cake")


def test_ngram_expectations_equal_counts_by_hand():
    captions = ["a b c"] * 4 + ["b c d"] * 3 + ["a d"] * 5
    found = {one.what: one for one in ngrams(corpus(captions, silent()), np.arange(12), 50)}
    words = 4 * 3 + 3 * 3 + 5 * 2
    expected = 7 * 7 / words  # b: 7 times, c: 7 times
    assert found["b c"].score == pytest.approx(7 * math.log(7 / expected) - (7 - expected))
    assert "a b c" not in found, "a b and b c explain it, or it stands in the rows of b c"
    assert float(surprise(3, 5)) == 0


def test_an_image_with_contradicting_captions_comes_before_one_with_captions_that_agree(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    refs = [str(tmp_path / f"{index}.png") for index in (0, 0, 1, 1, 2, 2, 3)]
    captions = ["a red boat", "a small red boat", "a dog", "the church at night", "same", "same", "alone"]
    images, broken = same_images([*refs, str(tmp_path / "none.png"), str(tmp_path / "no.png")], silent())
    assert broken == [7, 8] and len(set(images.tolist())) == 6 and images[0] == images[1]
    found = list(repeated_images(captions, images[:7], corpus(captions, silent()).hashes))
    assert [one.rows.tolist() for one in found] == [[2, 3], [0, 1]]


def test_images_that_a_model_was_not_shown_say_nothing_of_their_words():
    rng = np.random.default_rng(0)
    kind = rng.integers(4, size=600)
    features = torch.nn.functional.normalize(torch.from_numpy(np.eye(8)[kind] + 0.1 * rng.standard_normal((600, 8))).float(), dim=1)
    captions = [f"word{number} thing{number} more{rng.integers(5)}" for number in kind.tolist()]
    skipped = list(range(0, 600, 20))
    for row in skipped:
        captions[row] += " host"
        features[row] = torch.eye(8)[7]  # what a black square looks like
    images, hashes = np.arange(600), np.arange(600, dtype=np.uint64)

    def words(left_out):
        return {one.what for one in contradicting_words(captions, features, images, hashes, left_out)}

    assert "host" in words([])
    assert "host" not in words(skipped)
    assert not {int(row) for one in contradicting_words(captions, features, images, hashes, skipped) for row in one.rows} & set(skipped)


def test_kinds_take_turns_in_the_ranking():
    def some(kind, n):
        return [Suspect(kind, str(index), "", float(-index), np.array([index]), 1, 1, 1) for index in range(n)]

    found = ranked([some("a", 3), some("b", 1), iter(some("c", 2))], 5)
    assert [(one.rank, one.rank_in_kind, one.suspect.kind) for one in found] == [(1, 1, "a"), (2, 1, "b"), (3, 1, "c"), (4, 2, "a"), (5, 2, "c")]


def test_captions_that_a_spreadsheet_or_terminal_would_run_are_only_shown(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "one.png")
    hostile = ['=HYPERLINK("http://example.org")', "@SUM(1)", "plain \x1b[31m"]
    (tmp_path / "pairs.tsv").write_text("image\tcaption\n" + "".join(f'one.png\t"{caption.replace(chr(34), chr(34) * 2)}"\n' for caption in hostile))
    result = invoke("audit", "--data", tmp_path / "pairs.tsv", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "\x1b" not in result.output
    found = rows_of(tmp_path / "out" / "rows.csv")
    assert [row["caption"][:2] for row in found] == ["'=", "'@", "pl"]
    assert rows_of(tmp_path / "out" / "suspects.csv")[0]["what"].startswith("'=")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit"], "needs --data, the pairs"),
        (["audit", "--data", "x.tsv", "--model", "RN50"], "give one with --checkpoint"),
        (["audit", "--data", "nothing.tsv"], "no manifest at nothing.tsv"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(arguments, message):
    with pytest.raises(BenchError, match=message):
        invoke(*arguments)


def test_a_poison_folder_is_answered_with_the_command_that_exports_it(exported):
    with pytest.raises(BenchError, match="bench export"):
        invoke("audit", "--data", exported / "made")
