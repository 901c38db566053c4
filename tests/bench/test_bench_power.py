"""bench/power.py: what NVML says during the timed steps, with a synthetic NVML."""

import sys
import time
import types

import pytest
import tiny
import torch

sys.path.insert(0, str(tiny.ROOT / "bench"))  # no package: its scripts import each other by name

import power

from cjepa_fast.runtime import hardware

POWER, ENERGY = "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption"
REASONS = "nvmlDeviceGetCurrentClocksThrottleReasons"


class FakeNVML(types.ModuleType):
    """Gives each counter's values in turn, then the last; raises for those that are missing."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self, missing=(), **values):
        super().__init__("pynvml")
        self.missing, self.values = missing, {POWER: [400_000], ENERGY: [0], REASONS: [0]} | values

    def nvmlInit(self):
        if "nvmlInit" in self.missing:
            raise self.NVMLError

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        return {self.NVML_CLOCK_SM: 1755, self.NVML_CLOCK_MEM: 3201}[kind]

    def __getattr__(self, name):
        if name not in (POWER, ENERGY, REASONS):
            raise AttributeError(name)

        def counter(gpu):
            if name in self.missing:
                raise self.NVMLError(name)
            values = self.values[name]
            return values.pop(0) if len(values) > 1 else values[0]

        return counter


@pytest.fixture
def metered(monkeypatch):
    """Torch believes in a GPU; returns a function: the meter's findings with a synthetic NVML.

    Its block takes so many seconds, and until all of NVML's values have been read.
    """
    found = types.SimpleNamespace(uuid="ffc79498")
    monkeypatch.setattr(hardware, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)

    def run(seconds: float = 0.0, **nvml) -> dict[str, float]:
        fake = FakeNVML(**nvml)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        meter = power.PowerMeter()
        with meter.running():
            time.sleep(seconds)
            tiny.wait_for(lambda: len(fake.values[REASONS]) == 1, "the samples")
        return meter.found

    return run


def test_energy_is_the_counters_difference_and_the_clocks_are_sampled(metered):
    began = time.perf_counter()
    found = metered(0.2, **{ENERGY: [5_000_000, 5_090_000], REASONS: [0, 0x4, 0]})
    took_s = time.perf_counter() - began
    assert found["energy_j"] == pytest.approx(90)
    assert 90 / took_s <= found["power_w"] < 90 / 0.2  # over the time of the block
    assert (found["sm_mhz"], found["memory_mhz"]) == (1755, 3201)
    assert found["reasons"] == 0x4  # seen once is seen


def test_without_an_energy_counter_the_sampled_power_serves(metered):
    found = metered(0.1, missing=[ENERGY, REASONS])
    assert found["power_w"] == 400 and found["energy_j"] >= 400 * 0.1
    assert "reasons" not in found


def test_without_nvml_there_is_nothing(metered):
    assert metered(missing=["nvmlInit"]) == {}
    assert power.power_figures([{}, {}], 100) == {}


def test_an_error_within_the_block_ends_the_sampling(metered, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML())
    meter = power.PowerMeter()
    with pytest.raises(RuntimeError, match="a step"), meter.running():
        raise RuntimeError("a step")


def test_the_figures_of_several_gpus():
    one = {"energy_j": 90.0, "power_w": 400.0, "sm_mhz": 1700.0, "memory_mhz": 3200.0, "reasons": 4}
    other = one | {"energy_j": 110.0, "power_w": 500.0, "sm_mhz": 1600.0, "reasons": 0x41}
    assert power.power_figures([one, other], 50) == {
        "joules_per_image": 4.0, "power_w": 450.0, "sm_mhz": 1600.0, "memory_mhz": 3200.0,
        "throttled": "power cap, heat (hardware)",
    }  # fmt: skip
    assert power.power_figures([one | {"reasons": 1}], 50)["throttled"] == "no"  # it idled
