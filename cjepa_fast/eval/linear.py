"""A linear probe on cached features: logistic regression on standardised features.

scikit-learn's multinomial L-BFGS solver; its penalty C is the inverse of the L2 weight.
Shapes: n training images, m test images, D width.
"""

import argparse

import torch

from cjepa_fast.eval import command

HEADINGS = {"train_images": "train", "test_images": "test", "top1": "linear %"}


def predict(
    train_nD: torch.Tensor,
    label_n: torch.Tensor,
    test_mD: torch.Tensor,
    *,
    inverse_penalty: float = 0.1,
    iterations: int = 3000,
) -> torch.Tensor:
    """The probe's class for each test image: (m,) int64.

    Features are standardised by the training images' mean and standard deviation. Raises
    ValueError where there is but one class to learn.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(label_n.unique()) < 2:
        raise ValueError("a linear probe needs at least two classes among the training images")
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=iterations)
    )
    probe.fit(train_nD.double().numpy(), label_n.numpy())
    return torch.from_numpy(probe.predict(test_mD.double().numpy()))


def top1(train_nD, label_n, test_mD, test_label_m, **options) -> float:
    """Percent of the test images classified rightly; options as in `predict`."""
    right_m = predict(train_nD, label_n, test_mD, **options) == test_label_m
    return 100 * right_m.double().mean().item()


def add_options(parser: argparse.ArgumentParser) -> None:
    command.add_checkpoint(parser)
    command.add_sets(parser)
    command.add_features(parser)


def run(args: argparse.Namespace) -> None:
    """A row for each encoder."""
    sides = command.labelled_sides(args.data, args.test, args.max_train)
    rows = []
    for name, encoder in command.encoders_of(args).items():
        vectors = command.vectors_of(encoder, sides, args)
        counts = {"train_images": len(vectors[0]), "test_images": len(vectors[2])}
        rows.append({"encoder": name, **counts, "top1": top1(*vectors)})
    command.report(args, rows, HEADINGS, ("data", "test", "max_train", "crop", "bf16"))
