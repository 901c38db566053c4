"""What the kernels share: tables on their way to the device, in a CUDA graph and outside."""

import pytest
import torch

from cjepa_fast.kernels import launch

CPU = torch.device("cpu")


@pytest.fixture
def pretended(monkeypatch):
    """Recordings without a GPU, in memory that is this test's own."""
    monkeypatch.setattr(launch, "_space", [])
    monkeypatch.setattr(launch, "_asked", 0)

    def now(recording: bool) -> None:
        monkeypatch.setattr(launch, "recording", lambda device: recording)

    return now


def test_tables_of_a_recording_lie_beside_its_memory_and_are_written_at_its_end(pretended):
    """Memory of the graph's own is written by every replay, before the launch that reads it: so a
    table there, written once, would be garbage at the first replay (seen on a GPU)."""
    tables = [torch.arange(5), torch.arange(70, dtype=torch.int32).view(7, 10)]
    for table in tables:
        assert torch.equal(launch.to_device(table, CPU), table)
    with launch.recorded(CPU):
        (space,) = launch._space
        inside = range(space.data_ptr(), space.data_ptr() + len(space))
        space.fill_(255)
        pretended(True)
        made = [launch.to_device(table, CPU) for table in tables]
        pretended(False)
        for there, table in zip(made, tables, strict=True):
            assert there.shape == table.shape and there.dtype == table.dtype
            assert there.data_ptr() in inside and there.data_ptr() % 16 == 0
            assert not torch.equal(there, table)
    for there, table in zip(made, tables, strict=True):
        assert torch.equal(there, table)
    assert made[0].data_ptr() + made[0].nbytes <= made[1].data_ptr()


def test_a_recording_has_room_for_its_tables_alone(pretended):
    launch.to_device(torch.arange(5), CPU)
    pretended(True)
    with pytest.raises(RuntimeError, match="no room"):
        launch.to_device(torch.arange(5), CPU)
    with launch.recorded(CPU):
        launch.to_device(torch.arange(5), CPU)
        with pytest.raises(RuntimeError, match="no room"):
            launch.to_device(torch.arange(5), CPU)
