"""What a safe set held, from the sealed record's rows: by hand, and in the curve of a run of SafeCLIP."""

import numpy as np
import pytest
import torch

import benchmark
from benchmark.errors import BenchError
from benchmark.evaluate.splits import in_top, measure
from benchmark.testing import World
from defenses.safeclip import SafeCLIP

TINY = ("data.n_pairs=256", "data.n_held_out=64", "data.n_clean=64", "data.n_test=100", "data.n_probe=200", "train.epochs=3", "train.batch_size=32", "evaluation.linear_probe=none")


def test_the_values_of_a_split_are_those_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    poisoned = np.zeros(10, dtype=bool)
    poisoned[[1, 8]] = True
    found = measure(scores >= 0.6, scores, poisoned)
    assert found == {
        "safe_share/split": 0.4,
        "safe_poison_recall/split": 0.5,
        "risky_recall/split": 0.5,
        "safe_poison_share/split": 0.25,
        "safe_poison_lift/split": pytest.approx(1.25),
        "risky_precision/split": pytest.approx(1 / 6),
        "poison_in_top_0.1/split": 0.0,
        "poison_in_top_0.15/split": 0.5,  # of two rows
        "poison_in_top_0.3/split": 0.5,
        "split_auroc/split": pytest.approx((1 + 7) / 16),  # below the poisons lie 1 and 7 of 8 clean rows, by dissimilarity
    }


def test_without_poison_there_is_only_the_size_and_of_empty_sets_no_share():
    scores = np.arange(4.0)
    assert measure(scores > 1, scores, np.zeros(4, dtype=bool)) == {"safe_share/split": 0.5}
    poisoned = scores == 3
    assert not {"safe_poison_share/split", "safe_poison_lift/split"} & set(measure(scores > 9, scores, poisoned))
    assert "risky_precision/split" not in measure(scores >= 0, scores, poisoned)


def test_equal_scores_at_the_edge_count_in_part():
    scores, poisoned = np.array([1.0, 0.5, 0.5, 0.5, 0.5, 0.0]), np.array([False, True, False, True, False, False])
    assert [in_top(scores, poisoned, size) for size in (0, 1, 2, 3, 5, 6)] == [0, 0, 0.25, 0.5, 1, 1]


def test_safeclip_hands_in_every_epoch_with_a_safe_set(tmp_path):
    defense = SafeCLIP(unimodal_epochs=1, cross_warmup_epochs=0, first_share=0.5)
    lab = World(tmp_path).lab(defense, "lab")
    defense.defend(lab)
    assert [split.epoch for split in lab.splits] == [2, 3]
    dissimilarity_first, dissimilarity, _ = lab.handed_in
    for split, scores in zip(lab.splits, (dissimilarity_first, dissimilarity), strict=True):
        assert np.array_equal(split.kept, ~scores.flagged)
        assert split.scores == pytest.approx(-scores.values, abs=1e-3)


@pytest.mark.parametrize(("kept", "scores"), [(np.ones(191, dtype=bool), np.zeros(192)), (np.ones(192, dtype=bool), torch.full((192,), torch.nan))])
def test_a_split_of_other_rows_or_without_numbers_is_refused(tmp_path, kept, scores):
    with pytest.raises(BenchError, match=r"lab\.split\(2\) wants whether each of 192 rows was kept and a finite score"):
        World(tmp_path).lab(SafeCLIP(), "lab").split(2, kept, scores)


def test_the_curve_of_a_run_holds_its_splits_and_agrees_with_the_first_and_the_last(tmp_path):
    record = benchmark.run("backdoor", "safeclip", scale="smoke", sets=TINY, results=tmp_path)
    assert not any("/split" in name for name in record["curve"][0]["metrics"])
    n, n_poison = record["data"]["n_pairs"], record["poison"]["n_poison"]
    for point, score in zip(record["curve"][1:], ("dissimilarity_first", "dissimilarity"), strict=True):
        values, detected = point["metrics"], {entry["name"]: entry["value"] for entry in record["metrics"] if entry["of"] == score}
        assert values["safe_share/split"] == point["n_safe"] / n
        assert values["risky_recall/split"] == pytest.approx(detected["tpr_own"]) and values["risky_precision/split"] == pytest.approx(detected["precision_own"])
        assert values["split_auroc/split"] == pytest.approx(detected["auroc"], abs=0.01)
        assert values["safe_poison_share/split"] * point["n_safe"] == pytest.approx(values["safe_poison_recall/split"] * n_poison)
        assert {"poison_in_top_0.1/split", "poison_in_top_0.15/split", "poison_in_top_0.3/split"} <= set(values)
    table = benchmark.load_results(tmp_path)
    assert table[table.metric == "curve_safe_poison_recall"].epoch.tolist() == [2, 3]
