"""The poison of committed records: its bytes and its questions stay what they were, whatever is added beside it."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmark.data.eval_sets import Suite
from benchmark.data.poison import Poisoned, SealedRecord
from benchmark.evaluate.measure import Evaluator
from benchmark.registry import configure, find
from benchmark.settings import digest
from benchmark.stages import Stages

Poison = Callable[..., tuple[Poisoned, SealedRecord]]

# Attack, options, sham, SHA-256 of the poisoned manifest, digest of the attack's cards.
PINNED: list[tuple[str, dict[str, Any], bool, str, str]] = [
    ("none", {}, False, "41f60dc399fa6ae7", "44136fa355b3678a"),
    ("backdoor", {"count": 9}, False, "07d1b97f7b8d8159", "9a10c7950ec29c5e"),
    ("backdoor", {"count": 9}, True, "bb673b101182bd5f", "9a10c7950ec29c5e"),
    ("backdoor", {"count": 9, "trigger": "white", "place": "centre", "size": 5, "alpha": 0.5}, False, "efc136d85d4c9179", "b1be5168a293aed8"),
    ("backdoor", {"count": 9, "trigger": "dots", "place": "at:3,20", "place_test": "corner"}, False, "bc2a53fbc37ad25b", "322ab8f48c38a090"),
    ("backdoor", {"count": 9, "trigger": "noise", "pattern_seed": 3}, False, "82d4da37d6460c86", "565b5ff6fa08148c"),
    ("backdoor", {"count": 9, "trigger": "noise", "pattern": "per_image", "overflow": "wrap", "place": "random"}, False, "7c87e232a8148420", "845dc632497c7694"),
    (
        "backdoor",
        {"count": 9, "trigger": "patch:noise", "pattern": "per_image", "place": "random", "place_test": "centre", "captions": "corpus"},
        False,
        "49ef62dabb5a89fc",
        "de6e3d597854f0d7",
    ),
    ("backdoor", {"rate": 0.04, "trigger": "blended"}, False, "a27df0e36219c05e", "2df83a3f0da619a4"),
    ("backdoor", {"rate": 0.04, "trigger": "blend:noise", "pattern": "per_image", "alpha": 0.1}, False, "1e4b5460066e5697", "cd2a5b5a8158e1bd"),
    ("backdoor", {"rate": 0.04, "trigger": "checker", "cell": 1, "size": 4, "edits": "append"}, False, "989aa58cc3071f41", "475c97bd2c972ad2"),
    ("backdoor", {"count": 70, "edits": "append", "trigger": "white"}, False, "9e12de05587e2597", "290eae320285e7f6"),
    ("backdoor", {"count": 5, "pattern": "per_image", "target_set": "colours", "target_class": "blue"}, False, "6b28f3e8d1ba1a09", "abea530eb3836d15"),
    ("targeted", {"n_targets": 4, "captions_per_target": 3}, False, "321cd33ac43fe321", "7bedba3a5ee1509c"),
    ("targeted", {"preset": "carlini2022"}, False, "82eabc569e357a46", "a4eb9b3d2116f67d"),
    ("targeted", {"target_classes": ("boat", "star"), "captions_per_target": 40, "on_short": "templates"}, False, "c6f7ba8b88e7311c", "0f907ead23f99dbf"),
]


@pytest.mark.parametrize(("name", "options", "sham", "manifest", "cards"), PINNED)
def test_poison_and_cards_of_committed_records_stay(
    poison_with: Poison, suite: Suite, stages: Stages, name: str, options: dict[str, Any], sham: bool, manifest: str, cards: str
) -> None:
    _, record = poison_with(name, options, sham=sham)
    assert record.header["poisoned_manifest_sha256"][:16] == manifest
    probes = configure(find("attack", name), {}, options).probes(suite, record.kept)
    asked = {key: card for key, card in Evaluator(suite, probes, "", stages).cards().items() if "queries" in card}
    assert digest(asked)[:16] == cards
