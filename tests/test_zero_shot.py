import numpy as np
import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from benchmark.data.eval_sets import EvalSet, Split
from benchmark.errors import BenchError
from benchmark.evaluate.features import Encoder, prototypes, ranks, tied
from benchmark.evaluate.zero_shot import mean_per_class_recall, zero_shot
from benchmark.settings import ModelSettings
from benchmark.train.model import build

TEMPLATES = ("a photo of a {c}", "{c}", "a drawing of a {c} on paper")
CLASSES = ("boat", "tree", "red star", "cup", "key", "moon", "sun")


class Given:
    """A model whose image features stand in the first pixels and whose text features are given."""

    def __init__(self, texts):
        self.texts = texts

    def encode_images(self, images):
        return normalize(torch.from_numpy(images[:, 0, :, 0].astype(np.float32)), dim=-1)

    def encode_texts(self, texts):
        return self.texts(texts)


def shown(vectors):
    """Images uint8 (n, d, d, 3) whose first row of red is the vector (n, d)."""
    images = np.zeros((len(vectors), len(vectors[0]), len(vectors[0]), 3), np.uint8)
    images[:, 0, :, 0] = vectors
    return images


def eval_set_of(labels, images, classes=CLASSES, templates=("{c}",)):
    split = Split(images, np.asarray(labels, dtype=np.int64), tuple(f"q{index}" for index in range(len(labels))))
    return EvalSet("made", classes, templates, {}, None, split, split, split)


def one_hot_texts(texts):
    return torch.eye(len(CLASSES))[[CLASSES.index(text) for text in texts]]


def test_zero_shot_weights_equal_open_clips():
    model = build(ModelSettings(), 32, 0, torch.device("cpu"))
    model.net.eval()
    eval_set = eval_set_of([0], np.zeros((1, 32, 32, 3), np.uint8), templates=TEMPLATES)
    ours = Encoder([model]).prototypes(eval_set)[0]
    calls = [lambda name, template=template: template.replace("{c}", name) for template in TEMPLATES]
    theirs = open_clip.build_zero_shot_classifier(model.net, open_clip.SimpleTokenizer(context_length=32), list(CLASSES), calls, num_classes_per_batch=3)
    assert torch.allclose(ours.T, theirs, atol=1e-5)


def test_a_prototype_is_the_normalised_mean_of_its_templates():
    features = normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert torch.allclose(prototypes(features, 3)[1], normalize(features[3:].mean(0), dim=-1))


def test_a_tie_never_helps():
    scores = torch.tensor([[0.5, 0.5, 0.1], [0.9, 0.2, 0.2], [0.3, 0.3, 0.3]])
    assert ranks(scores, torch.tensor([0, 0, 2])).tolist() == [2, 1, 3]
    assert tied(scores, torch.tensor([0, 0, 2])).tolist() == [True, False, True]


def test_ranks_equal_counting_by_hand():
    scores = torch.rand(50, 9, generator=torch.Generator().manual_seed(0)).mul(8).round()
    labels = torch.arange(50) % 9
    by_hand = [1 + sum(float(row[c]) >= float(row[label]) for c in range(9) if c != label) for row, label in zip(scores, labels.tolist(), strict=True)]
    assert ranks(scores, labels).tolist() == by_hand


def test_a_perfect_encoder_scores_one_and_its_predictions_say_so():
    labels = [0, 1, 2, 3, 4, 5, 6, 0]
    metrics, table = zero_shot(Encoder([Given(one_hot_texts)]), eval_set_of(labels, shown(np.eye(7)[labels] * 255)))
    values = {metric.name: (metric.value, metric.n) for metric in metrics}
    assert values["zero_shot_acc1"] == (1.0, 8) and values["zero_shot_mean_per_class_recall"] == (1.0, 8) and values["n_ties"] == (0.0, 8)
    assert table["pred"].tolist() == labels and (table["rank_true"] == 1).all()


def test_a_constant_encoder_scores_zero_and_is_flagged():
    labels = [0, 1, 2, 3]
    images = shown([[9] * 7] * 4)
    encoder = Encoder([Given(lambda texts: normalize(torch.ones(len(texts), 7), dim=-1))])
    metrics, _ = zero_shot(encoder, eval_set_of(labels, images))
    assert {metric.name: metric.value for metric in metrics}["zero_shot_acc1"] == 0
    assert encoder.collapsed("x", images)
    assert not Encoder([Given(one_hot_texts)]).collapsed("x", shown(np.eye(7) * 255))


def test_top_five_of_five_classes_is_left_out():
    five = CLASSES[:5]
    encoder = Encoder([Given(lambda texts: torch.eye(7)[[CLASSES.index(text) for text in texts]])])
    names = {metric.name for metric in zero_shot(encoder, eval_set_of([0, 1], shown(np.eye(7)[:2] * 255), five))[0]}
    assert "zero_shot_acc1" in names and "zero_shot_acc5" not in names


def test_recall_is_averaged_over_classes_that_occur():
    assert mean_per_class_recall(torch.tensor([True, True, False, True]), torch.tensor([0, 0, 0, 5])) == pytest.approx((2 / 3 + 1) / 2)


def test_permuting_names_with_labels_changes_nothing_and_names_alone_drop_accuracy():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 70)
    images = shown(np.eye(7)[labels] * 200 + rng.integers(0, 50, (70, 7)))
    order = [3, 4, 5, 6, 0, 1, 2]
    renamed = tuple(CLASSES[index] for index in order)
    encoder = lambda: Encoder([Given(one_hot_texts)])  # noqa: E731
    plain = zero_shot(encoder(), eval_set_of(labels, images))[0][0].value
    together = zero_shot(encoder(), eval_set_of([order.index(label) for label in labels], images, renamed))[0][0].value
    assert plain == together == 1.0
    assert zero_shot(encoder(), eval_set_of(labels, images, renamed))[0][0].value == 0.0


def test_several_models_vote():
    good, above, below = Given(one_hot_texts), Given(lambda texts: one_hot_texts(texts).roll(1, 0)), Given(lambda texts: one_hot_texts(texts).roll(-1, 0))
    labels = [0, 1, 2]
    eval_set = eval_set_of(labels, shown(np.eye(7)[labels] * 255))
    assert zero_shot(Encoder([good, good, above]), eval_set)[0][0].value == 1.0
    assert zero_shot(Encoder([above, above, good]), eval_set)[0][0].value == 0.0
    # One vote each for a class and the next: the smaller one is predicted, as the certificate says.
    assert zero_shot(Encoder([good, above]), eval_set)[0][0].value == 1.0
    assert zero_shot(Encoder([good, below]), eval_set)[0][0].value == pytest.approx(1 / 3)


def test_classes_without_a_vote_stay_tied():
    model = Given(one_hot_texts)
    eval_set = eval_set_of([0], shown(np.eye(7)[[0]] * 255))
    scores = Encoder([model, model]).scores("made", eval_set.test.images, eval_set)
    assert ranks(scores, torch.tensor([0])).item() == 1
    assert {ranks(scores, torch.tensor([other])).item() for other in range(1, scores.shape[1])} == {scores.shape[1]}


def test_a_feature_that_is_not_finite_names_its_image():
    broken = Given(one_hot_texts)
    broken.encode_images = lambda images: torch.tensor([[1.0], [float("nan")]])
    with pytest.raises(BenchError, match="image 1 of made"):
        Encoder([broken]).images("made", shown([[1] * 7] * 2))


def test_an_image_set_is_encoded_once():
    calls = []
    model = Given(one_hot_texts)
    model.encode_images = lambda images: calls.append(1) or torch.eye(7)
    encoder = Encoder([model])
    encoder.images("x", shown(np.eye(7)))
    encoder.images("x", shown(np.eye(7)))
    assert calls == [1]
