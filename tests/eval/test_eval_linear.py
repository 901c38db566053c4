"""Linear probes: the quick one against one solved by other means, and the sweep."""

import argparse

import pytest
import torch

from cjepa_fast.eval.probes import linear, probe_sweep
from cjepa_fast.eval.probes.probe_sweep import LARS, ProbePlan, Probes, fit
from cjepa_fast.model.vit import Encoder


def newton_probe(train, label, test, penalty):
    """The minimum of sum of cross-entropies + |W|^2 / (2 C), by autograd and L-BFGS in float64."""
    mean, std = train.mean(0), train.std(0, correction=0)
    x, x_test = (train - mean) / std, (test - mean) / std
    W = torch.zeros(x.shape[1], int(label.max()) + 1, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(W.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [W, b], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective():
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ W + b, label, reduction="sum")
        loss = loss + W.square().sum() / (2 * penalty)
        loss.backward()
        return loss

    solver.step(objective)
    return (x_test @ W + b).argmax(1)


def test_same_as_an_independent_solution(seed):
    label = torch.randint(4, (400,))
    means = torch.randn(4, 10, dtype=torch.float64)
    scale = torch.logspace(-2, 2, 10, dtype=torch.float64)  # dimensions of very unequal size
    train = (means[label] + torch.randn(400, 10)) * scale + 5
    test = (means[torch.randint(4, (200,))] + torch.randn(200, 10)) * scale + 5
    ours = linear.predict(train, label, test, inverse_penalty=0.1)
    theirs = newton_probe(train, label, test, penalty=0.1)
    assert (ours == theirs).double().mean() >= 0.98  # ties at the solver's tolerance


def test_a_probe_that_has_diverged_is_wrong(seed):
    """NaN logits compare with nothing, so nothing stands before the right class."""
    x, label = torch.randn(400, 8), torch.randint(10, (400,))
    probes = Probes(x, 10, [8], 3)
    probes.stacks[0].weights[1].data[4, 2] = float("nan")
    probes.stacks[0].biases[2].data[7:] = -torch.inf  # a class that was not there in training
    sound, diverged, without = probes.percent(x, label)
    assert diverged == {"top1": 0.0, "top5": 0.0}
    assert 0 < sound["top1"] < 50 and 0 < without["top1"] < 50


def test_layers_are_numbers_of_the_last_or_blocks():
    encoder = Encoder(image_size=24, patch_size=8, width=24, depth=6, heads=3)
    assert linear.layer_list("4,1,2+5+2") == [4, 1, [2, 5]]
    last, chosen = linear.readings(encoder, [4, 1, [2, 5]])
    assert last == ([3, 4, 5, 6], {"last": 1, "last 4": 4})
    assert chosen == ([2, 5], {"2+5": 2})
    (whole,) = linear.readings(encoder, [1, 40])  # no more than there are
    assert whole == ([1, 2, 3, 4, 5, 6], {"last": 1, "last 6": 6})


def test_learns_what_is_linear_and_nothing_else(seed):
    x = torch.randn(4000, 6)
    label = (x[:, 0] + x[:, 1] > 0).long()
    chance = torch.randint(2, (4000,))  # 2,000 test labels: 50 % right, standard deviation 1.1
    assert linear.top1(x[:2000], label[:2000], x[2000:], label[2000:]) > 95
    assert 44 < linear.top1(x[:2000], chance[:2000], x[2000:], chance[2000:]) < 56


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="two classes"):
        linear.predict(torch.randn(4, 2), torch.zeros(4, dtype=torch.long), torch.randn(2, 2))


def blobs(n: int, classes: int = 3, width: int = 8, spread: float = 0.3):
    """Features (n, width) about one corner for each class, and labels (n,)."""
    label = torch.arange(n) % classes
    corners = 3 * torch.eye(classes, width)
    return corners[label] + spread * torch.randn(n, width), label


def test_lars_is_a_plain_loop(seed):
    matrix, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    ours = [matrix.clone().requires_grad_(), bias.clone().requires_grad_()]
    optimizer = LARS(ours, lr=0.7, weight_decay=0.1, momentum=0.9, trust=0.001)
    speed_m, speed_b = torch.zeros_like(matrix), torch.zeros_like(bias)
    for _ in range(4):
        gradients = [torch.randn_like(matrix), torch.randn_like(bias)]
        for p, g in zip(ours, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        step = gradients[0] + 0.1 * matrix
        step *= 0.001 * matrix.pow(2).sum().sqrt() / step.pow(2).sum().sqrt()
        speed_m, speed_b = 0.9 * speed_m + step, 0.9 * speed_b + gradients[1]
        matrix, bias = matrix - 0.7 * speed_m, bias - 0.7 * speed_b
    torch.testing.assert_close(ours[0].detach(), matrix)
    torch.testing.assert_close(ours[1].detach(), bias)


def test_lars_moves_weights_that_are_zero():
    p = torch.zeros(2, 2, requires_grad=True)
    p.grad = torch.ones(2, 2)
    LARS([p], lr=0.5).step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2), -0.5))


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_probes_trained_at_once_are_as_each_alone(seed, optimizer):
    x, label = blobs(60)
    grid = {"lr": (0.05, 0.01), "wd": (0.1, 0.0)}
    plan = ProbePlan(optimizer, epochs=4, batch=16, grid=grid)
    together = fit(x, label, 3, [4, 8], plan)
    for stack in together.stacks:
        for p, setting in enumerate(plan.settings()):
            only = {name: (value,) for name, value in setting.items()}
            alone = fit(x, label, 3, [stack.width], ProbePlan(optimizer, 4, 16, only)).stacks[0]
            torch.testing.assert_close(stack.weights[p], alone.weights[0], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(stack.biases[p], alone.biases[0], atol=1e-6, rtol=1e-5)
    weights = together.stacks[1].weights
    assert all(not torch.equal(weights[0], other) for other in weights[1:])


@pytest.mark.parametrize(
    "plan",
    [
        ProbePlan("lars", epochs=10, grid={"lr": (0.05, 0.01), "wd": (0.0,)}),
        ProbePlan("adamw", epochs=10, grid={"lr": (0.01,), "wd": (0.01, 0.0)}),
        ProbePlan("lbfgs"),
    ],
    ids=lambda plan: plan.optimizer,
)
def test_what_can_be_separated_is(seed, plan):
    x, label = blobs(240, classes=7)
    y, label_y = blobs(70, classes=7)
    rows = linear.sweep((x, label, y, label_y), [8], plan)
    assert rows[0]["top1"] == rows[0]["top5"] == rows[0]["held_out"] == 100


def test_a_narrow_probe_sees_the_last_columns_alone(seed):
    """Which are those of the last layer."""
    x, label = blobs(60)
    plan = ProbePlan("adamw", epochs=2, batch=16)
    narrow, cut = fit(x, label, 3, [4], plan), fit(x[:, 4:], label, 3, [4], plan)
    torch.testing.assert_close(narrow(x), cut(x[:, 4:]))


def test_lbfgs_is_the_quick_probe(seed):
    x, label = blobs(150, spread=2.0)
    y, label_y = blobs(90, spread=2.0)
    probe = fit(x, label, 3, [8], ProbePlan("lbfgs", grid={"C": (0.1,)}))
    assert probe.percent(y, label_y)[0]["top1"] == linear.top1(x, label, y, label_y)


def test_lbfgs_of_two_classes_and_of_a_class_without_images(seed):
    x, label = blobs(80, classes=2)
    assert fit(x, label, 2, [8], ProbePlan("lbfgs")).percent(x, label)[0]["top1"] == 100
    probe = fit(x, 2 * label, 4, [8], ProbePlan("lbfgs"))
    assert probe.percent(x, 2 * label)[0]["top1"] == 100


def test_top_1_and_top_5_by_hand():
    """Seven classes, one feature; class c has logit w_c x."""
    found = Probes(torch.tensor([[-1.0], [1.0]]), classes=7, widths=[1], count=1)
    found.stacks[0].weights[0].data = torch.tensor([[7.0], [6], [5], [4], [3], [2], [1]])
    x = torch.tensor([[1.0], [1.0], [1.0], [1.0]])
    right = found.percent(x, torch.tensor([0, 4, 5, 6]))[0]
    assert right == {"top1": 25.0, "top5": 50.0}
    found.stacks[0].weights[0].data.zero_()  # all alike: as a choice by chance
    tied = found.percent(x, torch.tensor([0, 1, 2, 3]))[0]
    assert tied == pytest.approx({"top1": 100 / 7, "top5": 500 / 7})
    found.stacks[0].weights[0].data[0] = 1.0  # one before the six
    tied = found.percent(x, torch.tensor([0, 1, 2, 3]))[0]
    assert tied == pytest.approx({"top1": 25, "top5": (100 + 3 * 100 * 4 / 6) / 4})


def test_a_collapsed_encoder_s_features_give_chance():
    x, label = torch.ones(40, 8), torch.arange(40) % 2
    for plan in ProbePlan("lbfgs"), ProbePlan("adamw", epochs=1):
        assert fit(x, label, 2, [8], plan).percent(x, label)[0]["top1"] == 50


def test_the_test_images_do_not_choose(seed):
    x, label = blobs(200, spread=3.0)
    y, label_y = blobs(300, spread=3.0)
    plan = ProbePlan("adamw", epochs=3)
    honest = linear.sweep((x, label, y, label_y), [8], plan)[0]
    shuffled = linear.sweep((x, label, y, label_y.roll(1)), [8], plan)[0]
    assert honest["chosen"] == shuffled["chosen"] and honest["probes"] == shuffled["probes"]
    assert honest["top1"] != shuffled["top1"]
    best = linear.sweep((x, label, y, label_y), [8], plan, choose="test")[0]
    assert best["top1"] == max(probe["top1"] for probe in best["probes"])
    assert "held_out" not in best


def test_large_numbers_of_classes_take_no_memory(seed):
    x, label = blobs(100, spread=3.0)
    y, label_y = blobs(30, spread=3.0)
    plan = ProbePlan("adamw", epochs=1, batch=50, grid={"lr": (0.01,), "wd": (0.0,)})
    few = linear.sweep((x, label, y, label_y), [8], plan)
    many = linear.sweep((x, 10**15 + 10**12 * label, y, 10**15 + 10**12 * label_y), [8], plan)
    assert few == many


def test_no_copy_of_a_held_out_image_is_trained_on(monkeypatch):
    seen = []
    original = probe_sweep.fit
    monkeypatch.setattr(linear, "fit", lambda x, *rest: (seen.append(x), original(x, *rest))[1])
    column = torch.arange(40.0)[:, None]
    x, label = torch.cat([column, column + 100]), torch.arange(80) % 2
    linear.sweep((x, label, x, label), [1], ProbePlan("adamw", epochs=1), copies=2)
    first, again = (set(rows.flatten().int().tolist()) for rows in seen)
    assert len(first) == 72 and {(i + 100) % 200 for i in first} == first
    assert again == {*range(40), *range(100, 140)}


def test_a_small_set_has_as_many_updates_as_the_paper_s():
    assert ProbePlan().batch_of(1_281_167) == 16384
    assert ProbePlan().batch_of(5000) == 65
    assert ProbePlan(batch=512).batch_of(100) == 100


def test_a_value_that_the_optimiser_does_not_know():
    args = argparse.Namespace(optimizer="lbfgs", sweep=[("lr", (0.1,))], epochs=50, batch=None)
    with pytest.raises(ValueError, match="--sweep lr: --optimizer lbfgs has C"):
        linear.complete_sweep(args)
    with pytest.raises(argparse.ArgumentTypeError, match="no list of numbers"):
        linear.values("lr=high")


@pytest.mark.parametrize(
    "given, name", [({"epochs": 10}, "--epochs"), ({"batch": 64}, "--probe-batch-size")]
)
def test_lbfgs_has_neither_epochs_nor_batches(given, name):
    plain = {"optimizer": "lbfgs", "sweep": None, "epochs": 50, "batch": None}
    linear.complete_sweep(argparse.Namespace(**plain))
    linear.complete_sweep(argparse.Namespace(**plain | given | {"optimizer": "adamw"}))
    with pytest.raises(ValueError, match=f"{name}: --optimizer lbfgs solves for all images"):
        linear.complete_sweep(argparse.Namespace(**plain | given))
