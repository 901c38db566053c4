"""model.checkpointing: the same bits from less memory, and which operations run twice for it."""

from collections import Counter

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from cjepa_fast.model import cpu_linear as linears
from cjepa_fast.model.block import Block
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.recompute import PARTS
from cjepa_fast.model.vit import Encoder

B, S, D, LAST = 2, 12, 16, 5
POLICIES = list(PARTS)
# Of a block's forward, what its backward runs again.
AGAIN = {
    "none": {},
    "norm_gelu": {"layer_norm": 2, "gelu": 1},
    "selective": {"layer_norm": 2, "gelu": 1, "linear": 1},
    "full": {"layer_norm": 2, "gelu": 1, "linear": 3, "softmax": 1},
}
NAMES = {
    "native_layer_norm": "layer_norm", "gelu": "gelu", "addmm": "linear", "mm": "linear",
    "_softmax": "softmax",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname in NAMES:
            self.count[NAMES[func._opname]] += 1
        return func(*args, **(kwargs or {}))


def kept_bytes(block: Block, x: torch.Tensor, last: int | None) -> int:
    """Of all storages that the forward keeps, each once, the weights left out."""
    weights = {p.untyped_storage()._cdata for p in block.parameters()}
    found = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, last)
    return sum(x.untyped_storage().nbytes() for key, x in found.items() if key not in weights)


def gradients(policy: str, dtype: torch.dtype, residual: str, mode: str) -> list[torch.Tensor]:
    """The prediction and every gradient of an encoder and a predictor under a policy."""
    torch.manual_seed(1)
    options = {"residual": residual, "checkpointing": policy}
    encoder = Encoder(12, 3, 16, 2, 2, **options).to(dtype)
    predictor = Predictor(16, (4, 4), 12, 3, 2, mode=mode, **options).to(dtype)
    images = torch.randn(B, 3, 12, 12, dtype=dtype)
    contexts = torch.stack([torch.randperm(16)[:6] for _ in range(B)])
    targets = torch.stack([torch.randperm(16)[:6].view(2, 3) for _ in range(B)])
    predicted = predictor(encoder(images, contexts), contexts, targets)
    predicted.float().square().sum().backward()
    trained = [*encoder.parameters(), *predictor.parameters()]
    return [predicted, *(p.grad for p in trained if p.requires_grad)]


@pytest.mark.parametrize("mode", ["per_target", "one_pass"])
@pytest.mark.parametrize(
    ("dtype", "residual"),
    [(torch.float32, "bf16"), (torch.bfloat16, "bf16"), (torch.bfloat16, "fp32")],
)
def test_gradients_are_the_same_to_the_bit(dtype, residual, mode):
    wanted = gradients("none", dtype, residual, mode)
    for policy in POLICIES[1:]:
        found = gradients(policy, dtype, residual, mode)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)), policy


@pytest.mark.parametrize("last", [None, LAST])
@pytest.mark.parametrize("policy", POLICIES)
def test_only_what_is_said_runs_twice(seed, policy, last):
    """A part that ends in a Linear stops before it: what follows keeps its output."""
    block = Block(D, 2, 4.0, checkpointing=policy)
    x = torch.randn(B, S, D, requires_grad=True)
    with Operations() as forward:
        out = block(x, last)
    queries = int(last is not None)  # a matmul of its own, and the first of two
    assert forward.count == {"layer_norm": 2, "gelu": 1, "linear": 4 + queries, "softmax": 1}
    with Operations() as backward:
        out.sum().backward()
    wanted = Counter(AGAIN[policy])
    wanted["linear"] += 2 * (4 + queries) + queries * (policy != "none")
    assert backward.count == wanted


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("last", [None, LAST])
def test_what_is_kept(seed, stream, last):
    """Bytes between the policies by hand: bf16 beside a residual stream of either dtype."""
    x = torch.randn(B, S, D, dtype=stream, requires_grad=True)
    blocks = {name: Block(D, 2, 4.0, checkpointing=name).bfloat16() for name in POLICIES}
    kept = {name: kept_bytes(block, x, last) for name, block in blocks.items()}
    tokens, outputs, wide = B * S, B * (last or S), stream.itemsize
    norms = 2 * (tokens + outputs) * D + 2 * wide * (tokens + outputs)  # outputs, mean and 1 / std
    affine = 4 * D * wide if stream == torch.float32 else 0  # their weights and biases, widened
    # torch's own Linear of the queries copies its part, ours keeps the view
    ours = linears._plain(*(torch.empty(1, 1, dtype=torch.bfloat16) for _ in range(3)))
    queries = 2 * outputs * D if last and not ours else 0
    assert kept["none"] - kept["norm_gelu"] == norms + affine + queries + 2 * 4 * D * outputs
    assert kept["norm_gelu"] - kept["selective"] == 2 * 4 * D * outputs  # fc1's output
    least = 2 * D * (2 * tokens + 2 * outputs) + wide * D * outputs  # k, v, q, attended, the sum
    assert kept["selective"] - kept["full"] >= least
    assert kept["full"] == wide * D * tokens


def test_the_target_keeps_nothing(seed):
    encoder = Encoder(12, 3, 16, 2, 2, checkpointing="selective").requires_grad_(False)
    with torch.no_grad():
        tokens = encoder(torch.randn(B, 3, 12, 12))
    assert tokens.shape == (B, 16, 16) and tokens.grad_fn is None
