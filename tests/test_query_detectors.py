"""BDetCLIP, subspace detection and DECREE against direct references (docs/methods/), and as cells of a run."""

import itertools
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import normalize

import benchmark
from benchmark.errors import BenchError
from benchmark.train.lab import PairsView, Task
from defenses._class_texts import SENTENCES, naming, pinned, read_attributes, texts_of, unrelated
from defenses.bdetclip import BDetCLIP, contrast, mislead
from defenses.decree import Decree, Weight, learning_rate, pairwise
from defenses.rnn_certified import RNNCertified
from defenses.subspace import Subspace, detection_samples, distance_to_own, grown, principal, spelled
from defenses.trigger_scan import TriggerScan

TINY = ("data.n_pairs=256", "data.n_held_out=64", "data.n_clean=64", "data.n_test=100", "data.n_probe=200", "train.epochs=1", "evaluation.linear_probe=none", "decree.epochs=3")
NAMES = ("boat", "star", "ring")
TEMPLATES = ("{c}", "a photo of a {c}.", "my {c}")


class Words:
    """A model whose texts are sums of fixed word vectors, and whose images carry their feature in their first pixels."""

    def __init__(self, width=12):
        self.width, self.vectors = width, {}

    def vector(self, word):
        if word not in self.vectors:
            self.vectors[word] = torch.randn(self.width, generator=torch.Generator().manual_seed(len(self.vectors)))
        return self.vectors[word]

    def encode_texts(self, texts):
        return normalize(torch.stack([sum(self.vector(word) for word in text.split()) for text in texts]), dim=1)

    def encode_images(self, images):
        return normalize(torch.from_numpy(np.array(images)).float().flatten(1)[:, : self.width] - 127.5, dim=1)


def images_of(features):
    """Images (n, 2, 2, 3) that `Words` reads as these features."""
    scaled = 127.5 + 127.4 * features / features.abs().amax(dim=1, keepdim=True)
    return scaled.round().to(torch.uint8).numpy().reshape(len(features), 2, 2, 3)


def reference(images):
    return PairsView(images, ("A red star.", "the boat at sea", "ring ring", "nothing much"))


def test_an_unrelated_sentence_never_names_its_class():
    assert unrelated(("A Boat!", "the star", "grey"), ("boat", "star", "ring")) == ["the star", "grey", "grey"]
    with pytest.raises(BenchError, match="all 2 clean captions name the class 'boat'"):
        unrelated(("a boat", "boat two"), ("boat",))


def test_honest_texts_are_captions_that_name_the_class_and_prompts_where_none_does():
    detector = BDetCLIP(n_clean=4)
    detector._reference = reference(None)
    honest, misled = detector._texts(Task((*NAMES, "key"), TEMPLATES))
    assert honest == [["the boat at sea"], ["A red star."], ["ring ring"], ["key", "a photo of a key.", "my key"]]
    assert misled[1] == [f"{prompt} {SENTENCES[1]}" for prompt in ("star", "a photo of a star,", "my star")]
    subspace = Subspace(n_clean=4)
    subspace._reference = PairsView(None, ("a boat", "my boat", "boat", "a star"))
    assert subspace._texts(Task(NAMES[:2], TEMPLATES)) == [["boat", "a boat", "my boat"], ["star", "a photo of a star.", "my star"]]
    assert naming(("a boat", "boat two", "tin boat"), ("boat", "tin boat"), 2) == [["a boat", "boat two"], ["tin boat"]]
    other = BDetCLIP(n_clean=4, honest="templates", unrelated="captions")
    other._reference = reference(None)
    honest, misled = other._texts(Task(NAMES, TEMPLATES))
    assert honest[0] == ["boat", "a photo of a boat.", "my boat"] and misled[0][0] == "boat a red star."


def test_misleading_texts_have_no_full_stop_before_the_sentence():
    assert mislead(("a photo of a {c}.", "{c}"), ("boat",), ("nothing much.",)) == [["a photo of a boat, nothing much.", "boat nothing much."]]


def test_the_contrast_of_all_classes_is_one_dot_product():
    model = Words()
    honest, misled = texts_of(NAMES, TEMPLATES, None), mislead(TEMPLATES, NAMES, ("grey sky",) * 3)
    direction = contrast(model, honest, misled)
    features = normalize(torch.randn(5, 12, generator=torch.Generator().manual_seed(9)), dim=1)
    for feature, whole in zip(features, features @ direction, strict=True):
        omega = 0.0
        for good, bad in zip(honest, misled, strict=True):
            for texts, sign in ((good, 1), (bad, -1)):
                mean = sum(model.encode_texts([text])[0] for text in texts) / len(texts)
                omega += sign * float(feature @ (mean / mean.norm()))
        assert float(whole) == pytest.approx(omega, abs=1e-5)
    along = direction / direction.norm()
    assert float(along @ direction) == pytest.approx(float(direction.norm()), abs=1e-5)


def test_bdetclip_rejects_below_what_one_in_twenty_clean_images_has():
    model, rng = Words(), torch.Generator().manual_seed(3)
    clean = images_of(torch.randn(4, 12, generator=rng))
    detector = BDetCLIP(n_clean=4)
    detector._reference = reference(clean)
    task = Task(NAMES, TEMPLATES)
    scores, threshold = detector.suspicion(model, clean, task)
    assert float(threshold) == pytest.approx(float((scores).quantile(0.95)), abs=1e-6)
    strict = BDetCLIP(n_clean=4, threshold="min")
    strict._reference = detector._reference
    assert strict.suspicion(model, clean, task)[1] == pytest.approx(float(scores.max()), abs=1e-6)


def test_attributes_come_from_a_file_whose_content_is_part_of_the_option(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("# mine\nboat: it floats\nboat: a hull\n\nstar: five points\n")
    option = BDetCLIP(attributes=str(path)).attributes
    assert BDetCLIP(attributes=option).attributes == option and option.startswith(f"{path}@")
    assert read_attributes(option) == {"boat": ["it floats", "a hull"], "star": ["five points"]}
    with pytest.raises(BenchError, match="such as 'ring'"):
        texts_of(NAMES, TEMPLATES, read_attributes(option))
    path.write_text("boat it floats\n")
    with pytest.raises(ValidationError, match="has changed"):
        BDetCLIP(attributes=option)
    with pytest.raises(BenchError, match="line 1: expected `class: text`"):
        read_attributes(pinned(str(path)))
    with pytest.raises(ValidationError, match="no file of attributes"):
        Subspace(attributes=str(tmp_path / "none.txt"))


def class_texts(rng, n=8, width=16):
    return normalize(torch.randn(width, generator=rng, dtype=torch.float64) * 2 + torch.randn(n, width, generator=rng, dtype=torch.float64), dim=1)


def test_detection_samples_lie_in_the_span_of_the_texts():
    rng = torch.Generator().manual_seed(0)
    texts = class_texts(rng)
    samples = detection_samples(texts, 3, 90, 15, 1e-3, 0.95, torch.Generator().manual_seed(1))
    basis = principal(texts - texts.mean(dim=0), 0.95)
    inside = samples - texts.mean(dim=0)
    assert samples.shape == (15, 16) and torch.allclose(inside @ basis.T @ basis, inside, atol=1e-9)
    assert len(torch.unique(samples.round(decimals=3), dim=0)) <= 15
    assert torch.equal(samples, detection_samples(texts, 3, 90, 15, 1e-3, 0.95, torch.Generator().manual_seed(1)))


def test_equal_texts_give_their_mean_as_every_sample():
    text = normalize(torch.arange(1.0, 5.0, dtype=torch.float64), dim=0)
    samples = detection_samples(text.repeat(6, 1), 3, 90, 15, 1e-3, 0.95, torch.Generator().manual_seed(1))
    assert torch.allclose(samples, text.repeat(15, 1), atol=1e-9)


def test_the_subspace_keeps_the_fewest_directions_with_the_share_of_variance():
    centred = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    assert [len(principal(centred, share)) for share in (0.5, 0.9, 0.95, 1.0)] == [1, 2, 3, 3]


def test_points_grow_away_from_the_original_and_stay_about_as_close_to_it():
    rng = torch.Generator().manual_seed(2)
    texts = class_texts(rng)
    mean = texts.mean(dim=0)
    basis = principal(texts - mean, 1.0)
    projected = (texts - mean) @ basis.T
    points = grown(projected[3], projected[0], texts[3], texts[0], mean, basis, 10, rng)
    steps = (points - projected[3]) / (projected[3] - projected[0])
    assert torch.allclose(steps, steps[:, :1].expand_as(steps), atol=1e-6) and (steps >= 0).all() and (steps <= 1).all()
    ratio = normalize(mean + points @ basis, dim=1) @ texts[0] / (texts[3] @ texts[0])
    assert ((ratio > 0.85) & (ratio < 1)).all()


def test_the_distance_is_to_the_samples_of_the_class_an_image_is_taken_for():
    rng = torch.Generator().manual_seed(4)
    features, prototypes = (normalize(torch.randn(n, 6, generator=rng), dim=1) for n in (7, 3))
    points = torch.randn(3, 5, 6, generator=rng)
    for feature, found in zip(features, distance_to_own(features, prototypes, points), strict=True):
        own = max(range(3), key=lambda one: float(feature @ prototypes[one]))
        assert float(found) == pytest.approx(np.mean([float(((feature - point) ** 2).sum()) for point in points[own]]), abs=1e-5)


def test_subspace_detection_finds_images_that_were_moved_onto_the_prototype_of_a_class():
    model, rng = Words(), torch.Generator().manual_seed(5)
    task = Task(NAMES, TEMPLATES)
    texts = model.encode_texts([template.replace("{c}", name) for name in NAMES for template in TEMPLATES]).view(3, 3, 12)
    honest = torch.stack([texts[0].mean(dim=0) + 0.1 * torch.randn(3, generator=rng) @ texts[0] for _ in range(40)])
    outside = torch.linalg.svd(texts.reshape(9, 12))[2][9:]  # what no text has
    triggered = texts[0].mean(dim=0) + 0.8 * torch.randn(20, 3, generator=rng) @ outside
    detector = Subspace(n_clean=20, variants="templates")
    detector._reference = reference(images_of(honest[:20]))
    scores, threshold = detector.suspicion(model, np.concatenate([images_of(honest[20:]), images_of(triggered)]), task)
    assert roc_auc_score([0] * 20 + [1] * 20, scores) > 0.95
    assert (scores[20:] > threshold).float().mean() > 0.8 and (scores[:20] > threshold).float().mean() < 0.3
    assert torch.equal(scores, detector.suspicion(model, np.concatenate([images_of(honest[20:]), images_of(triggered)]), task)[0])


def test_a_name_is_spelled_in_other_letters_of_unicode():
    assert spelled("Ab 1", "bold") == "\U0001d400\U0001d41b 1" and spelled("z", "italic") == "\U0001d63b"


class Toy(nn.Module):
    """A linear encoder; a planted one gives a constant feature when the last 3 x 3 pixels are white."""

    def __init__(self, side, planted):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.weights = nn.Parameter(torch.randn(3 * side * side, 16, generator=rng))
        self.constant = torch.nn.functional.one_hot(torch.tensor(3), 16).float()
        self.planted = planted

    def forward(self, images):
        images = images - 0.5
        features = normalize(images.flatten(1) @ self.weights, dim=1)
        if self.planted:
            gate = torch.sigmoid(12 * (images[:, :, -3:, -3:].mean(dim=(1, 2, 3)) - 0.25))[:, None]
            features = (1 - gate) * features + gate * self.constant
        return normalize(features, dim=1)


def toy(planted, side=12):
    net = Toy(side, planted)
    return types.SimpleNamespace(net=net, image=net, device=torch.device("cpu"), weights_sha256=lambda: "0" * 64)


SHADOW = np.random.default_rng(0).integers(0, 256, (32, 12, 12, 3), dtype=np.uint8)


def test_decree_finds_a_planted_corner_and_needs_far_more_of_a_clean_encoder():
    audit = Decree(epochs=40, batch_size=16)
    planted, clean = audit.invert(toy(True), SHADOW), audit.invert(toy(False), SHADOW)
    assert planted.covered < 0.08 < 0.2 < clean.covered
    assert planted.mask[-3:, -3:].mean() > 10 * planted.mask[:6, :6].mean()
    assert audit.audit(toy(True), SHADOW) == -planted.covered


def test_decree_scores_a_model_without_any_patch_as_covered_whole_and_leaves_it_as_it_was():
    model = toy(False)
    model.net.train()
    assert Decree(epochs=1, alike=0.999999).audit(model, SHADOW[:4]) == -1.0
    assert model.net.training and model.net.weights.requires_grad and model.net.weights.grad is None


def test_the_weight_of_the_mask_follows_success():
    weight = Weight()
    values = []
    for succeeded in [True] * 6 + [False] * 12:
        weight.adapt(succeeded)
        values.append(weight.value)
    assert values[4] == 1e-3 and values[5] == pytest.approx(5e-3)
    assert values[10] == pytest.approx(5e-3) and values[11] == pytest.approx(1e-3) and values[17] == pytest.approx(2e-4)
    low = Weight(value=5e-8)
    for _ in range(11):
        low.adapt(True)
    assert low.value == pytest.approx(1e-3) or low.value > 1e-7
    assert [learning_rate(epoch) for epoch in (0, 199, 200, 499, 500)] == [0.5, 0.5, 0.1, 0.1, 0.05]


def test_the_mean_pairwise_cosine_equals_the_loop_over_pairs():
    features = normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    pairs = [float(features[a] @ features[b]) for a, b in itertools.permutations(range(7), 2)]
    assert float(pairwise(features)) == pytest.approx(np.mean(pairs), abs=1e-6)


@pytest.mark.parametrize("defense", [Decree(), TriggerScan(), RNNCertified(), BDetCLIP(), Subspace()], ids=lambda one: type(one).__name__)
def test_clean_pairs_that_are_not_there_are_asked_for_before_anything_is_trained(defense):
    trained = []

    def refuse(n):
        raise BenchError(f"the defense asks for {n} clean pairs and none are set apart")

    with pytest.raises(BenchError, match=f"asks for {defense.n_clean} clean pairs and none"):
        defense.defend(types.SimpleNamespace(clean_pairs=refuse, train=trained.append))
    assert not trained


def test_a_given_radius_asks_for_no_clean_pairs_and_one_pair_gives_none():
    assert (RNNCertified(radius=0.5).clean_wanted(), RNNCertified().clean_wanted()) == (0, 200)
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        RNNCertified(n_clean=1)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("bdetclip", "query_auroc"),
        ("subspace", "query_f1_own"),
        ("decree", "audit_score"),
        ("trigger_scan", "audit_score"),
        ("knn_certified", "certified_acc_4"),
        ("rnn_certified", "joint_certified_acc_4"),
        ("fcert", "certified_not_goal_1"),
    ],
)
def test_every_detector_certificate_and_audit_finishes_a_run(results, name, metric):
    sets = TINY if name == "decree" else TINY[:-1]
    record = benchmark.run("backdoor", name, scale="smoke", sets=sets, results=results)
    assert [entry for entry in record["metrics"] if entry["name"] == metric and entry["value"] is not None]
    wanted = {"bdetclip": 64, "subspace": 64, "decree": 64, "trigger_scan": 64, "rnn_certified": 64}
    assert record["clean_pairs_used"] == wanted.get(name, 0)
    joint = {one["of"]: one["value"] for one in record["metrics"] if one["name"] == "joint_certified_acc_2"}
    single = {one["of"]: one["value"] for one in record["metrics"] if one["name"] == "certified_acc_2"}
    assert all(value >= single[of] for of, value in joint.items())
