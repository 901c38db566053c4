"""The target encoder: an EMA of the context encoder, kept in fp32.

    target <- momentum * target + (1 - momentum) * encoder

A rank keeps the fp32 EMA of the fragments of the encoder whose fp32 masters it owns: all
under ZeRO-0, its share under the higher stages. The module that computes the targets holds a
working copy in the compute dtype, written from the EMA: a bf16 EMA would drift, since at
momentum 0.999 most updates are below its rounding. The copy is whole on every rank, but under
ZeRO-3, where it is partitioned as the encoder's weights are and gathered as the forward comes to
them. In fp8 the working copy of the blocks' matrices is in FP8: of the EMA rounded to bf16,
on one rank and on many, and always whole.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from cjepa_fast.checkpoint.owned import Fragment, fragment_of
from cjepa_fast.kernels.ema import Number, ema_update, ema_update_rows
from cjepa_fast.model.fp8 import linears_to_fp8


def whole_view(weight: nn.Parameter, fragment: Fragment) -> torch.Tensor:
    return fragment_of(weight.data, fragment)


FragmentView = Callable[[nn.Parameter, Fragment], torch.Tensor]
Partition = Callable[[nn.Module], FragmentView]


class TargetEMA:
    """The EMA of `masters` (fragments of the encoder's fp32 weights), in the target module.

    target: a copy of the encoder in fp32, moved to `dtype` here; its values start the EMA.
    group: the ranks that together own all fragments, None where each owns them all. fp8: the
    blocks compute in FP8, dtype is bf16. partition: splits a module's weights among the
    ranks, each to write what it owns: it returns where a fragment of a weight is then to be
    written.
    Of each fragment `cast` has the EMA, its master, and its view into the module's weights; in
    FP8, `by_row` has the blocks' matrices instead, as EMA, master and layer.
    """

    def __init__(
        self,
        target: nn.Module,
        masters: list[Fragment],
        dtype: torch.dtype,
        group: dist.ProcessGroup | None = None,
        fp8: bool = False,
        partition: Partition | None = None,
    ):
        self.masters = masters
        self.group = None if partition else group
        self._partitioned = partition is not None
        parameters = dict(target.named_parameters())
        self.fragments = [
            Fragment(m.name, m.start, fragment_of(parameters[m.name].data, m).float().clone())
            for m in masters
        ]
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self.module = target.to(dtype).requires_grad_(False).eval()
        matrices = linears_to_fp8(self.module) if fp8 else {}
        # A share may cut rows: those are quantised when all ranks have completed them.
        by_row = matrices if group is None else {}
        self._late = [] if by_row else [(trained[name], m) for name, m in matrices.items()]
        if partition:
            view_of = partition(self.module)
        else:
            self._flatten({name: p for name, p in trained.items() if name not in by_row})
            view_of = whole_view
        pairs = list(zip(self.fragments, masters, strict=True))
        self.by_row = [(a, m, by_row[a.name]) for a, m in pairs if a.name in by_row]
        self.cast = [(a, m, view_of(trained[a.name], a)) for a, m in pairs if a.name not in by_row]

    def _flatten(self, weights: dict[str, nn.Parameter]) -> None:
        """Lay the target's weights in one buffer, so that one collective completes them all."""
        self._flat = torch.cat([p.data.flatten() for p in weights.values()])
        offset = 0
        for p in weights.values():
            p.data = self._flat[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """One step of the EMA, after the optimiser's, and its working copy."""
        with self._completed_by_others():
            ema_update(*self._lists(), momentum, [working for _, _, working in self.cast])
        self.update_rows(momentum)
        self._wait_where_partitioned()

    def _lists(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """EMA and masters of what is cast."""
        return [a.values for a, _, _ in self.cast], [m.values for _, m, _ in self.cast]

    @torch.no_grad()
    def update_rows(self, momentum: Number) -> None:
        """The EMA of the matrices in FP8, and those, by row: none in another precision."""
        if self.by_row:
            emas, masters, layers = zip(*self.by_row, strict=True)
            values = [layer.weight.data for layer in layers]
            ema_update_rows(
                [a.values.view_as(v) for a, v in zip(emas, values, strict=True)],
                [m.values.view_as(v) for m, v in zip(masters, values, strict=True)],
                momentum,
                values,
                [layer.scales for layer in layers],
            )

    @torch.no_grad()
    def write_working_copy(self) -> None:
        """Cast the EMA into the module's weights, completed from the other ranks."""
        with self._completed_by_others():
            if self.cast:
                working = [view for _, _, view in self.cast]
                torch._foreach_copy_(working, self._lists()[0])
            for ema, _, layer in self.by_row:
                layer.write(ema.values.to(self._flat.dtype))
        self._wait_where_partitioned()

    def _wait_where_partitioned(self) -> None:
        """DeepSpeed gathers on its own CUDA stream, which does not wait for this one's writing."""
        if self._partitioned and any(view.is_cuda for _, _, view in self.cast):
            torch.cuda.current_stream().synchronize()

    @contextlib.contextmanager
    def _completed_by_others(self) -> Iterator[None]:
        """Within it this rank writes its share of the working copy, the others theirs."""
        if self.group is not None:
            self._flat.zero_()  # each value has one owner: a sum of it and zeros is exact
        yield
        if self.group is not None:
            dist.all_reduce(self._flat, group=self.group)
            for weight, layer in self._late:
                layer.write(weight.data)
