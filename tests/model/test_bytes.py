"""What a fused block moves between its matmuls, counted: docs/performance.md's figures.

A copy that nobody asked for (.contiguous(), .to(), cat) costs a pass over memory and shows in no
result. Here every launch of our kernels and every operation of torch on tensors as long as the
tokens are counted, each input read once and each output written once.
"""

import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cjepa_fast.model import fp8
from cjepa_fast.model.block import Block, run_fused

sys.path.insert(0, str(tiny.ROOT / "bench"))  # no package: its scripts import each other by name

import stand_in

B, S, D, H, E = 2, 64, 128, 2, 2  # E bytes a value
TOKENS = B * S
# Values of device memory that a block moves a token, in units of its width.
FORWARD, BACKWARD = 20, 28
FP8_FORWARD = 18.5  # of values of 2 bytes; an FP8 value is half of one
# Of a block trained in FP8 beside it: 7 D inputs and 9 D gradients, each read and written as FP8.
FP8_INPUTS, FP8_GRADIENTS = 7 * 1.5, 9 * 1.5
FP8_WEIGHTS = 1.5, 3.5  # of values of 2 bytes a weight: rows; columns, copied first
MATMULS = {"mm", "addmm"}
# Arguments of a kernel that it neither reads nor writes, by the constant that says so.
UNREAD = {"add_norm": ("ADD", "y", "s"), "add_norm_backward": ("LATER", "ds")}


class Traffic(TorchDispatchMode):
    """Bytes by name: of operations of torch as they come, of kernels through `launched`.

    A tensor counts that has a value or more for each token: not statistics, sums and weights.
    """

    def __init__(self):
        super().__init__()
        self.bytes: dict[str, int] = {}

    def add(self, name: str, tensors) -> None:
        moved = sum(t.numel() * t.itemsize for t in tensors if t.numel() >= TOKENS * D)
        if moved:
            self.bytes[name] = self.bytes.get(name, 0) + moved

    def launched(self, launch: stand_in.Launch) -> None:
        read = dict(launch.tensors)
        flag, *unread = UNREAD.get(launch.name, ("",))
        if flag and not launch.arguments[flag]:
            read = {name: t for name, t in read.items() if name not in unread}
        if launch.name == "quantise":  # x stands for what is not there
            read = {name: t for name, t in read.items() if name == "x" or t is not read["x"]}
        self.add(launch.name, read.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        memory = {t.untyped_storage().data_ptr() for t in given}
        name = function.overloadpacket.__name__
        fresh = any(t.untyped_storage().data_ptr() not in memory for t in made)
        written = function._schema.is_mutable
        own = function.namespace == "cjepa_fast"  # what these launch is counted by kernel
        if (fresh or written) and not own and not name.startswith(("empty", "new_empty")):
            self.add(name, given + made * fresh)
        return out

    def between_matmuls(self) -> int:
        return sum(count for name, count in self.bytes.items() if name not in MATMULS)


def blocks(count: int, kind: str) -> list[Block]:
    gelu = "tanh" if "tanh" in kind else "exact"
    made = [Block(D, H, 4.0, backend="triton", gelu=gelu).bfloat16() for _ in range(count)]
    if "trained" in kind:
        fp8.train_in_fp8(SimpleNamespace(blocks=made))
    elif "fp8" in kind:
        fp8.linears_to_fp8(SimpleNamespace(blocks=made, named_modules=lambda: []))
    return made


def traffic(count: int, trained: bool, kind: str = "") -> tuple[Traffic, Traffic]:
    """Of a stack of blocks and the norm behind it: forward, backward."""
    made, norm = blocks(count, kind), torch.nn.LayerNorm(D).bfloat16()
    x = torch.zeros(B, S, D, dtype=torch.bfloat16)
    forward, backward = Traffic(), Traffic()
    with torch.set_grad_enabled(trained):
        x.requires_grad_(trained)
        with stand_in.launches(forward.launched), forward:
            out = run_fused(made, norm, x)
        if trained:
            upstream = torch.zeros_like(out)
            with stand_in.launches(backward.launched), backward:
                torch.autograd.grad(out, [x, *(p for b in made for p in b.parameters())], upstream)
    return forward, backward


def a_block(trained: bool, kind: str = "") -> tuple[float, float]:
    """Values a token, in units of D, of one block within a stack, forward and backward: what one
    block more adds."""
    unit = TOKENS * D * E
    few, more = traffic(2, trained, kind), traffic(3, trained, kind)
    return tuple(
        (b.between_matmuls() - a.between_matmuls()) / unit for a, b in zip(few, more, strict=True)
    )


def test_a_block_of_the_target_moves_20_values_a_token_and_width():
    assert a_block(trained=False) == (FORWARD, 0)


def test_a_trained_block_moves_48():
    assert a_block(trained=True) == (FORWARD, BACKWARD)
    assert FORWARD + BACKWARD == 48


def test_a_block_of_tanh_moves_the_same_where_the_matmuls_do_not_compute_it():
    assert a_block(trained=False, kind="tanh") == (FORWARD, 0)
    assert a_block(trained=True, kind="tanh") == (FORWARD, BACKWARD)


@pytest.fixture
def fp8_matmuls(monkeypatch):
    """As on a GPU one launch each, and no copies in fp32."""

    def matmul(x, weight, bias):
        return x.scales.new_empty(*x.values.shape[:-1], len(weight.values), dtype=torch.bfloat16)

    monkeypatch.setattr(fp8, "matmul_reference", matmul)


@pytest.mark.parametrize("kind", ["fp8", "fp8 tanh"])
def test_a_block_of_the_target_in_fp8_moves_less(fp8_matmuls, kind):
    """Its two norms write half, its GELU too; the input of proj is read and written once more."""
    assert a_block(trained=False, kind=kind) == (FP8_FORWARD, 0)
    norms, attention, proj, gelu = 2 * 3.5, 4, 1.5, 6
    assert norms + attention + proj + gelu == FP8_FORWARD


@pytest.mark.parametrize("kind", ["trained fp8", "trained fp8 tanh"])
def test_a_block_trained_in_fp8_moves_what_it_quantises_beside(fp8_matmuls, kind):
    """Here the weights count too: each has at least as many values as a token's width for each."""
    weights = 12 * D**2 / (TOKENS * D)
    rows, columns = (weights * values for values in FP8_WEIGHTS)
    wanted = FORWARD + FP8_INPUTS + rows, BACKWARD + FP8_GRADIENTS + columns
    assert a_block(trained=True, kind=kind) == wanted


def test_by_kernel():
    """As the kernels' docstrings say; nothing of torch but the matmuls."""
    unit = TOKENS * D * E
    few, more = (traffic(count, True) for count in (2, 3))
    for way, wanted in (
        (0, {"add_norm": 8, "attention": 4, "gelu": 8}),
        (1, {"add_norm_backward": 8, "attention_backward": 8, "gelu_backward": 12}),
    ):
        names = more[way].bytes.keys() - MATMULS
        added = {n: (more[way].bytes[n] - few[way].bytes.get(n, 0)) / unit for n in names}
        assert {n: v for n, v in added.items() if v} == wanted


@pytest.mark.parametrize("stray", ["contiguous", "to", "cat"])
def test_a_stray_copy_is_seen(monkeypatch, stray):
    """Of each kind, once in a block's forward."""
    from cjepa_fast.model import block

    copies = {
        "contiguous": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1).contiguous(),
        "to": lambda x: x.float().bfloat16(),
        "cat": lambda x: torch.cat([x[:, :1], x[:, 1:]], 1),
    }
    attend = block.attend_heads
    wrong = lambda attn, qkv, trained: copies[stray](attend(attn, qkv, trained))  # noqa: E731
    monkeypatch.setattr(block, "attend_heads", wrong)
    assert a_block(trained=False)[0] > FORWARD


@pytest.mark.parametrize("name", ["performance.md"])
def test_the_documentation_says_the_same(name):
    text = " ".join((tiny.ROOT / "docs" / name).read_text(encoding="utf-8").split())
    assert f"{FORWARD} values a token and unit of width" in text
    assert f"{FORWARD + BACKWARD} where it is trained" in text
    assert f"{FP8_FORWARD} in FP8" in text
    assert f"{FP8_INPUTS + FP8_GRADIENTS:.0f} more where it is trained in FP8" in text
