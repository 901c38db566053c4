"""Linear probes on cached features, all of a sweep trained at once.

The probes that see the same layers are stacked: a batch of features is read once, and one matmul
gives the logits of all, (B, D) x (P C, D) -> (B, P, C). Each has its own learning rate and weight
decay, so each is trained as if it were alone.

The protocol is that of I-JEPA and C-JEPA: LARS, batch 16384, 50 epochs, a tenth of the learning
rate every 15. For how many images their learning rates are is not said; here for 256, as is common
with LARS: as they stand they are too small for it. So they are taken times 64, also for the smaller
batch of a small set; times N / 256 for a batch N that is named. Before a probe each feature is
standardised by the training images' mean and standard deviation: what BatchNorm without affine does
in MAE's linear probe (He et al. 2021, arXiv 2111.06377, App. A.1), without its noise. Features are
of centre crops.
Shapes: n training images, m test images, B of a batch, P probes, C classes, D width.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from cjepa_fast.data import rng
from cjepa_fast.eval.splits import require_classes
from cjepa_fast.telemetry.progress import shown_bar

GRIDS = {  # of the sweep, by optimiser; LARS's is the paper's
    "lars": {"lr": (0.01, 0.05, 0.001), "wd": (0.0005, 0.0)},
    "adamw": {"lr": (0.001, 0.0003, 0.0001), "wd": (0.01, 0.0)},
    "lbfgs": {"C": (0.01, 0.1, 1.0)},
}
PAPER_BATCH = 16384
PAPER_STEPS = 78  # an epoch, of ImageNet's 1.28 million images
LR_BATCH = 256  # images that a learning rate of LARS is for
DROPS = 0.3  # of all epochs, between two cuts of the learning rate to a tenth: 15 of 50
TOPS = (1, 5)


@dataclass(frozen=True)
class ProbePlan:
    """How probes are trained. grid: the values by name, of which every combination is a probe.

    batch: None for the paper's, cut so that an epoch of a small set has as many updates as one of
    ImageNet: LARS moves a weight by a share of its own norm, and so needs their number.
    """

    optimizer: str = "lars"
    epochs: int = 50
    batch: int | None = None
    grid: dict[str, tuple[float, ...]] | None = None

    def settings(self) -> list[dict[str, float]]:
        grid = self.grid or GRIDS[self.optimizer]
        return [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]

    def batch_of(self, n: int) -> int:
        return min(self.batch or min(PAPER_BATCH, -(-n // PAPER_STEPS)), n)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step of a matrix is as long as the matrix, times lr and `trust`.

    You et al. 2017 (arXiv 1708.03888), as in MoCo v3 and MAE: biases are neither decayed nor
    scaled. A matrix or gradient of zeros takes a plain step.
    """

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=0.001):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.dim() > 1:
                    update = update + group["weight_decay"] * p
                    ratio = group["trust"] * p.norm() / update.norm()
                    update = update * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                velocity = self.state[p]["momentum"].mul_(group["momentum"]).add_(update)
                p.sub_(group["lr"] * velocity)


class Stack(nn.Module):
    """P linear classifiers of the last `width` features, (B, D) -> (B, P, C), that begin alike."""

    def __init__(self, width: int, count: int, classes: int):
        super().__init__()
        self.width, self.count = width, count
        start = 0.01 * torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
        self.weights = nn.ParameterList(start.clone() for _ in range(count))
        self.biases = nn.ParameterList(torch.zeros(classes) for _ in range(count))

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        weight, bias = torch.cat(list(self.weights)), torch.cat(list(self.biases))
        return F.linear(x_BD[:, -self.width :], weight, bias).unflatten(1, (self.count, -1))


class Probes(nn.Module):
    """Every setting of a plan on every width, and the standardisation before them."""

    def __init__(self, train_nD: torch.Tensor, classes: int, widths: list[int], count: int):
        super().__init__()
        std, mean = torch.std_mean(train_nD, 0, correction=0)
        self.register_buffer("mean_D", mean)
        self.register_buffer("std_D", std.clamp(min=1e-6))
        self.stacks = nn.ModuleList(Stack(width, count, classes) for width in widths)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """The logits of all: (B, widths * settings, C), a width's settings side by side."""
        x_BD = (x_BD.to(self.mean_D) - self.mean_D) / self.std_D
        return torch.cat([stack(x_BD) for stack in self.stacks], 1)

    @torch.no_grad()
    def percent(self, x_mD: torch.Tensor, label_m: torch.Tensor) -> list[dict[str, float]]:
        """{"top1", "top5"} of each probe, in percent; no top 5 where there are not more classes. Of
        equal logits each place is as likely, so that a collapsed encoder gives chance."""
        places = [_place(self(x_BD), label_B.to(self.mean_D.device))
                  for x_BD, label_B in _batches(x_mD, label_m, 1024)]  # fmt: skip
        above_mP, ties_mP = (torch.cat(found) for found in zip(*places, strict=True))
        classes = len(self.stacks[0].biases[0])
        found = [{} for _ in above_mP.T]
        for k in (k for k in TOPS if k < classes):
            right_mP = ((k - above_mP) / (ties_mP + 1)).clamp(0, 1)
            for row, right in zip(found, right_mP.double().mean(0).tolist(), strict=True):
                row[f"top{k}"] = 100 * right
        return found


def _place(logits_BPC: torch.Tensor, label_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many classes stand before the right one, and how many beside it: (B, P) on the CPU.

    All before it where a probe has diverged. (-inf is what a class without training images has.)
    """
    right_BP1 = logits_BPC.gather(2, label_B[:, None, None].expand(-1, logits_BPC.shape[1], 1))
    nan_BP = logits_BPC.isnan().any(2)
    above_BP = (logits_BPC > right_BP1).sum(2).masked_fill(nan_BP, logits_BPC.shape[2])
    ties_BP = ((logits_BPC == right_BP1).sum(2) - 1).masked_fill(nan_BP, 0)
    return above_BP.cpu(), ties_BP.cpu()


def _batches(x_nD: torch.Tensor, label_n: torch.Tensor, size: int):
    return zip(x_nD.split(size), label_n.split(size), strict=True)


def fit(
    train_nD: torch.Tensor,
    label_n: torch.Tensor,
    classes: int,
    widths: list[int],
    plan: ProbePlan,
    device: torch.device | str = "cpu",
) -> Probes:
    """Probes trained on features (n, D); widths: how many of the last columns a stack sees.

    Raises ValueError where there is but one class to learn.
    """
    require_classes(label_n, "a linear probe")
    settings = plan.settings()
    probes = Probes(train_nD, classes, widths, len(settings)).to(device)
    if plan.optimizer == "lbfgs":
        _solve(probes, train_nD, label_n, settings)
    else:
        _descend(probes, train_nD, label_n, settings, plan)
    return probes


def _solve(probes: Probes, train_nD: torch.Tensor, label_n: torch.Tensor, settings) -> None:
    """scikit-learn's logistic regression; C is the inverse of the L2 penalty."""
    from sklearn.linear_model import LogisticRegression

    x_nD = ((train_nD - probes.mean_D.cpu()) / probes.std_D.cpu()).double()
    tried = [(stack, p, C["C"]) for stack in probes.stacks for p, C in enumerate(settings)]
    with shown_bar(len(tried), "linear probes", "probe") as bar:
        for stack, p, inverse_penalty in tried:
            found = LogisticRegression(C=inverse_penalty, max_iter=3000)
            found.fit(x_nD[:, -stack.width :].numpy(), label_n.numpy())
            weight, bias = (torch.from_numpy(x) for x in (found.coef_, found.intercept_))
            if len(weight) == 1:  # of two classes it gives the second's lead alone
                weight, bias = (torch.cat([-x, x]) / 2 for x in (weight, bias))
            stack.weights[p].data.zero_()
            stack.biases[p].data.fill_(-torch.inf)  # classes without a training image
            stack.weights[p].data[found.classes_] = weight.to(stack.weights[p])
            stack.biases[p].data[found.classes_] = bias.to(stack.biases[p])
            bar.update()


def _descend(probes: Probes, train_nD, label_n, settings, plan: ProbePlan) -> None:
    batch, device = plan.batch_of(len(label_n)), probes.mean_D.device
    scale = (plan.batch or PAPER_BATCH) / LR_BATCH if plan.optimizer == "lars" else 1.0
    groups = [
        {"params": [stack.weights[p], stack.biases[p]], "peak": scale * setting["lr"],
         "weight_decay": setting["wd"]}
        for stack in probes.stacks for p, setting in enumerate(settings)
    ]  # fmt: skip
    optimizer = {"lars": LARS, "adamw": torch.optim.AdamW}[plan.optimizer](groups)
    with shown_bar(plan.epochs, "linear probes", "epoch") as bar:
        for epoch in range(plan.epochs):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * 0.1 ** int(epoch / (DROPS * plan.epochs))
            for index_B in rng.permutation(0, epoch, len(label_n)).split(batch):
                logits_BPC = probes(train_nD[index_B].to(device))
                label_BP = label_n[index_B, None].to(device).expand(logits_BPC.shape[:2])
                losses_BP = F.cross_entropy(logits_BPC.transpose(1, 2), label_BP, reduction="none")
                optimizer.zero_grad()
                losses_BP.mean(0).sum().backward()
                optimizer.step()
            bar.update()
