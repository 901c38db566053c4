"""kNN against scikit-learn's, a case by hand, and its errors."""

import numpy as np
import pytest
import tiny
import torch

from cjepa_fast.data.sources import open_images
from cjepa_fast.eval.probes import knn


def reference(train, label, test, k, temperature):
    """scikit-learn's classifier: Euclidean on the unit sphere, where |a - b|^2 = 2 - 2 cos."""
    from sklearn.neighbors import KNeighborsClassifier

    def weights(distance):
        return np.exp((1 - distance**2 / 2) / temperature)

    def unit(x):
        x = x.double().numpy()
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    classifier = KNeighborsClassifier(k, weights=weights, algorithm="brute")
    return classifier.fit(unit(train), label.numpy()).predict(unit(test))


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0)])
@pytest.mark.parametrize("centre", [False, True])
def test_same_as_scikit_learn(seed, k, temperature, centre, monkeypatch):
    monkeypatch.setattr(knn, "TRAIN", 17)  # fewer than k, and no divisor of 300
    monkeypatch.setattr(knn, "TEST", 10)
    n, m, D, classes = 300, 97, 12, 5
    label = torch.randint(classes, (n,))
    means = torch.randn(classes, D)
    train = means[label] + 1.5 * torch.randn(n, D) + 3
    test = means[torch.randint(classes, (m,))] + 1.5 * torch.randn(m, D) + 3
    ours = knn.predict(train, label, test, k=k, temperature=temperature, centre=centre)
    shift = train.mean(0) if centre else 0
    theirs = reference(train - shift, label, test - shift, k, temperature)
    assert (ours.numpy() == theirs).mean() > 0.985  # two near-tied votes may round apart
    assert len(set(theirs)) > 1


def test_large_numbers_of_classes_take_no_memory(seed, monkeypatch):
    """They are as good as any: the same winners, also of a tie, which the lower number wins."""
    monkeypatch.setattr(knn, "TEST", 10)
    label, train, test = torch.randint(5, (60,)), torch.randn(60, 4), torch.randn(25, 4)
    few = knn.predict(train, label, test, k=7)
    many = knn.predict(train, 10**15 + 10**12 * label, test, k=7)
    assert torch.equal(many, 10**15 + 10**12 * few) and len(few.unique()) > 1
    train = torch.tensor([[1.0, 0.1], [1.0, -0.1]])
    tied = knn.predict(train, torch.tensor([10**12, 7]), torch.tensor([[1.0, 0.0]]), k=2)
    assert tied.tolist() == [7]


def test_by_hand_the_votes_are_weighted():
    """One neighbour at similarity 1 outvotes two of another class at 0.8 only when sharp."""
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    label = torch.tensor([0, 1, 1])
    test = torch.tensor([[2.0, 0.0]])
    sharp = knn.predict(train, label, test, k=3, temperature=0.07)  # e^(0.2/0.07) = 17 > 2
    blunt = knn.predict(train, label, test, k=3, temperature=1.0)  # e^0.2 = 1.2 < 2
    nearest = knn.predict(train, label, test, k=1, temperature=1.0)
    assert (sharp.item(), blunt.item(), nearest.item()) == (0, 1, 0)


def test_length_does_not_count_and_a_low_temperature_does_not_overflow():
    train = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
    label = torch.tensor([0, 1])
    test = torch.tensor([[0.1, 0.2], [3.0, 1.0]])
    assert knn.predict(train, label, test, k=2, temperature=1e-4).tolist() == [1, 0]


def test_centring_finds_what_a_common_offset_hides():
    label = torch.arange(2).repeat(50)
    train = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    train[:, 0] += label * 2 - 1
    far = train + 1e4 * torch.ones(8)
    assert knn.top1(far, label, far, label, k=5, centre=True) == 100


def test_pixels_that_cannot_be_read_are_not_counted(tmp_path, monkeypatch):
    images = open_images(tiny.write_images(tmp_path / "set", count=24), cache=tmp_path / "cache")
    read = knn.image_vectors
    monkeypatch.setattr(
        knn, "image_vectors", lambda *args, **how: [x[1:] for x in read(*args, **how)]
    )
    keep = {"train_keep": torch.arange(20), "test_keep": torch.arange(20, 24)}
    found = knn.pixel_baselines(images, images, **keep, k=3, threads=1)
    counts = [(row["train_images"], row["test_images"]) for row in found.values()]
    assert counts == [(19, 3), (19, 3)]


def test_percent():
    train = torch.eye(2)
    label = torch.tensor([0, 1])
    assert knn.top1(train, label, train[[0, 1, 1, 1]], torch.tensor([0, 1, 0, 0]), k=1) == 50


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 3}, {"temperature": 0.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        knn.predict(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), **{"k": 1, **options})
