"""The linear probe against a logistic regression solved by other means."""

import pytest
import torch

from cjepa_fast.eval import linear


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


def test_learns_what_is_linear_and_nothing_else(seed):
    x = torch.randn(4000, 6)
    label = (x[:, 0] + x[:, 1] > 0).long()
    chance = torch.randint(2, (4000,))  # 2,000 test labels: 50 % right, standard deviation 1.1
    assert linear.top1(x[:2000], label[:2000], x[2000:], label[2000:]) > 95
    assert 44 < linear.top1(x[:2000], chance[:2000], x[2000:], chance[2000:]) < 56


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="two classes"):
        linear.predict(torch.randn(4, 2), torch.zeros(4, dtype=torch.long), torch.randn(2, 2))
