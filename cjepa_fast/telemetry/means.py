"""Means of what each step tells, taken without waiting for the device."""

import math

import torch


class DeviceMeans:
    """Means of named scalars, kept on their own device until read; non-finite values left out."""

    def __init__(self):
        self._sums: dict[tuple, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, scalars: dict[str, torch.Tensor | float]) -> None:
        groups: dict[torch.device, list[str]] = {}
        for name, value in scalars.items():
            device = value.device if isinstance(value, torch.Tensor) else torch.device("cpu")
            groups.setdefault(device, []).append(name)
        for device, names in groups.items():
            values = torch.stack([to_scalar(scalars[name]) for name in names])
            finite = values.isfinite()
            both = torch.stack([torch.where(finite, values, 0), finite.to(values.dtype)])
            key = (device, *names)
            self._sums[key] = self._sums[key] + both if key in self._sums else both

    def read(self) -> dict[str, float | None]:
        """The means by name (None where no value was finite): one transfer a device."""
        totals: dict[str, list[float]] = {}
        for (_, *names), both in self._sums.items():
            for name, total, count in zip(names, *both.tolist(), strict=True):
                known = totals.setdefault(name, [0.0, 0.0])
                known[0] += total
                known[1] += count
        return {
            name: to_number(total / count) if count else None
            for name, (total, count) in totals.items()
        }


def to_scalar(value: torch.Tensor | float) -> torch.Tensor:
    """A 0-d fp32 tensor where the value lies; a Python number (K, seconds) lies on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.reshape(()).float()
    return torch.tensor(float(value))


def to_number(value: torch.Tensor | float) -> float | int | None:
    """A JSON number, or None for what JSON has no word for."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    return value if math.isfinite(value) else None
