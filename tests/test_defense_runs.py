"""Pre-training and repair defenses as runs: what stands in their records, with and without augmentation."""

import pytest

import benchmark
from benchmark.errors import BenchError

TINY = ("data.n_pairs=256", "data.n_held_out=64", "data.n_clean=64", "data.n_test=100", "data.n_probe=200", "train.epochs=3", "train.batch_size=32", "evaluation.linear_probe=none")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def run(shared, defense, *sets):
    return benchmark.run("backdoor", defense, scale="smoke", sets=(*TINY, *sets), results=shared)


def values(record, of):
    return {entry["name"]: entry["value"] for entry in record["metrics"] if entry["of"] == of}


@pytest.mark.parametrize("defense", ["safeclip+aug", pytest.param("safeclip", marks=pytest.mark.slow)])
def test_the_split_of_safeclip_is_measured_and_its_stages_are_in_the_curve(shared, defense):
    record = run(shared, defense)
    assert [point["phase"] for point in record["curve"]] == ["unimodal", "risky+safe", "risky+safe"]
    for score in ("dissimilarity", "dissimilarity_first", "mixture"):
        assert {"auroc", "average_precision", "precision_at_n", "fpr_own", "tpr_own"} <= values(record, score).keys()
    flagged = values(record, "dissimilarity_first")
    n, n_poison = record["data"]["n_pairs"], record["poison"]["n_poison"]
    assert record["curve"][1]["n_risky"] == round(flagged["tpr_own"] * n_poison + flagged["fpr_own"] * (n - n_poison)), "flagged rows are the risky ones"


@pytest.mark.parametrize("defense", ["cleanclip+aug", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cleanclip", "finetune", "finetune+aug", "par", "par+aug"))])
def test_a_repair_counts_its_clean_pairs_and_shows_its_own_curve(shared, defense):
    record = run(shared, defense, "defense.n_clean=64")
    assert record["clean_pairs_used"] == 64
    assert {point["phase"] for point in record["curve"]} == {"repair"} and len(record["curve"]) == 3
    assert values(record, "filter") == {}


def test_a_repair_that_asks_for_more_clean_pairs_than_there_are_is_refused(shared):
    with pytest.raises(BenchError, match="the defense asks for 128 clean pairs and 64 are set apart"):
        run(shared, "par")


@pytest.mark.slow
@pytest.mark.parametrize("unlearn", ["constraint", "ascent", "filter"])
def test_abl_hands_in_what_it_isolates(shared, unlearn):
    record = run(shared, "abl", f"defense.unlearn={unlearn}")
    assert {"auroc", "tpr_own"} <= values(record, "isolation").keys()
    assert (values(record, "filter") != {}) == (unlearn == "filter")
    assert record["curve"][-1]["phase"] == {"constraint": "unlearn", "ascent": "ascent", "filter": "clip"}[unlearn]


def test_models_that_vote_have_no_curve_and_no_kept_rows(shared):
    before = set((shared / "cache" / "train").glob("*/epoch-*.safetensors"))
    record = run(shared, "dpa")
    assert record["curve"] == [] and values(record, "filter") == {}
    assert any(entry["name"] == "zero_shot_acc1" for entry in record["metrics"])
    added = set((shared / "cache" / "train").glob("*/epoch-*.safetensors")) - before
    assert [path.name for path in added] == ["epoch-003.safetensors"] * 3, "snapshots other than the last are gone"
