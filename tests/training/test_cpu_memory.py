"""On a CPU the micro-batch is cut to what fits, and the step's images stay."""

import pytest
import tiny
import torch

import cjepa_fast
from cjepa_fast.config import from_values, load, load_run, validate
from cjepa_fast.runtime import cgroups, distributed, memory
from cjepa_fast.training import cpu_micro_batch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def configured(**data):
    own = {**tiny.CONFIG["data"], "batch_size": 48, "micro_batch_size": 48, **data}
    return validate(tiny.CONFIG | {"run": {"precision": "fp32"}, "data": own})


@pytest.fixture
def room(monkeypatch):
    """Gives a configuration room for so many images, and for what it holds whatever they are."""

    def give(config, images: float) -> None:
        fixed, image = cpu_micro_batch.needed(config)
        free = int((fixed + images * image) / cpu_micro_batch.SHARE) + 1
        monkeypatch.setattr(memory, "free_bytes", lambda: free)

    return give


@pytest.mark.parametrize(("images", "micro_batch"), [(99, 48), (48, 48), (30, 24), (7, 6), (0, 2)])
def test_the_largest_even_share_that_fits(room, images, micro_batch):
    config = configured()
    room(config, images)
    found = cpu_micro_batch.fitted(config, CPU, None)
    assert found.data.micro_batch_size == micro_batch and found.data.batch_size == 48
    assert bool(cpu_micro_batch.messages(config, found)) == (micro_batch < 48)


def test_a_gpu_is_left_to_its_own_messages(room):
    config = configured()
    room(config, 1)
    assert cpu_micro_batch.fitted(config, GPU, None) is config


def without_regulariser(config):
    return from_values(config, {"loss.vicreg.beta": 0.0})


def test_a_resumed_run_keeps_its_cut(room):
    config = configured()
    room(config, 1000)
    assert (
        cpu_micro_batch.fitted(config, CPU, configured(micro_batch_size=6)).data.micro_batch_size
        == 6
    )
    assert cpu_micro_batch.fitted(config, CPU, config) is config


def test_a_resumed_run_may_take_larger_ones_where_that_is_accepted_or_changes_no_statistic(room):
    config, begun = configured(), configured(micro_batch_size=6)
    room(config, 1000)
    assert cpu_micro_batch.fitted(config, CPU, begun, accepted=True) is config
    plain = without_regulariser(config)
    assert cpu_micro_batch.fitted(plain, CPU, without_regulariser(begun), asked_before=6) is plain
    room(config, 10)
    fits = cpu_micro_batch.fitted(config, CPU, begun, accepted=True)
    assert fits.data.micro_batch_size == 8
    assert "memory" in cpu_micro_batch.messages(config, fits, begun=6)[0]
    assert (
        "6 images instead of 48, as the run began;" in cpu_micro_batch.messages(config, begun, 6)[0]
    )


@pytest.mark.parametrize("images", [1000, 3])
@pytest.mark.parametrize(
    ("context", "kept"), [("random", True), ("prefix", True), ("packed", True), ("fixed", False)]
)
def test_a_resumed_run_without_a_regulariser_keeps_the_micro_batch_that_cut_its_contexts(
    room, context, kept, images
):
    """Whatever the memory is now; an earlier version's checkpoint does not say what was asked."""
    config, begun = (
        from_values(without_regulariser(one), {"mask.context": context})
        for one in (configured(), configured(micro_batch_size=6))
    )
    room(config, images)
    anew = 48 if images == 1000 else 3
    for asked_before in (None, 48):
        found = cpu_micro_batch.fitted(config, CPU, begun, asked_before=asked_before)
        assert found.data.micro_batch_size == (6 if kept else anew)
    for options in ({"asked_before": 6}, {"accepted": True}):
        found = cpu_micro_batch.fitted(config, CPU, begun, **options)
        assert found.data.micro_batch_size == anew
    whole = cpu_micro_batch.fitted(config, CPU, config)
    assert whole.data.micro_batch_size == (48 if kept else anew)


class Enough(cjepa_fast.Callback):
    def on_step(self, step, terms):
        return step == 2


def unregularised(folder):
    sizes = tiny.CONFIG["data"] | {"micro_batch_size": 16}
    loss = {"vicreg": {"beta": 0.0}}
    return tiny.write_config(folder, data=sizes, loss=loss, run={"precision": "fp32"})


def test_a_resume_has_the_same_bits_where_more_memory_is_free(tmp_path, monkeypatch, one_thread):
    """The contexts of a step's images are cut to the shortest of their micro-batch."""
    config = unregularised(tmp_path)
    runs = [{"run.dir": str(tmp_path / name)} for name in ("whole", "stopped")]
    monkeypatch.setattr(cpu_micro_batch, "most_images", lambda config: 4)
    whole = cjepa_fast.pretrain(config, overrides=runs[0])
    cjepa_fast.pretrain(config, overrides=runs[1], callbacks=[Enough()])
    monkeypatch.setattr(cpu_micro_batch, "most_images", lambda config: 16)
    resumed = cjepa_fast.pretrain(config, overrides=runs[1], resume="auto")
    assert [row["context_k"] for row in resumed.log()] == [row["context_k"] for row in whole.log()]
    name = "encoder.safetensors"
    assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_resume_takes_another_micro_batch_that_is_asked_for(tmp_path, monkeypatch):
    config = unregularised(tmp_path)
    monkeypatch.setattr(cpu_micro_batch, "most_images", lambda config: 4)
    run = cjepa_fast.pretrain(config, callbacks=[Enough()])
    monkeypatch.setattr(cpu_micro_batch, "most_images", lambda config: 16)
    cjepa_fast.pretrain(config, overrides={"data.micro_batch_size": 8}, resume="auto")
    assert load_run(run.folder).data.micro_batch_size == 8


def test_all_ranks_take_the_smallest(room, monkeypatch):
    config = configured()
    room(config, 1000)
    monkeypatch.setattr(distributed, "all_gather_objects", lambda mine: [mine, 5])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert cpu_micro_batch.fitted(config, CPU, None).data.micro_batch_size == 4


def test_what_is_told_names_both_sizes_and_a_model_that_is_too_large(room, monkeypatch):
    config = configured()
    room(config, 6)
    found = cpu_micro_batch.fitted(config, CPU, None)
    (line,) = cpu_micro_batch.messages(config, found)
    assert "6 images instead of 48" in line and "still takes 48 images" in line
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    assert "WARNING: weights and optimiser alone" in cpu_micro_batch.messages(config, found)[1]


def test_a_step_saves_no_more_than_is_counted():
    """Against the bytes of a real forward."""
    from cjepa_fast.training import build
    from cjepa_fast.training.trainer import Trainer

    config = configured(batch_size=8, micro_batch_size=8)
    trainer = Trainer(config, CPU, 10)
    masks = build.build_masks(config)(0, 0, torch.arange(8))
    saved = memory.SavedActivations(trainer.engine.module)
    with saved.counting():
        trainer.engine(
            torch.randn(8, 3, 24, 24), masks.context, masks.target_idx_BMP, torch.randn(8, 36, 24)
        )
    assert saved.bytes <= 8 * cpu_micro_batch.needed(config)[1] <= 3 * saved.bytes


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    whole = memory.free_bytes()
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "none")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert memory._free_of_container() is None
    (tmp_path / "memory.max").write_text("1000005\n")
    assert memory.free_bytes() == 1_000_000 < whole
    (tmp_path / "memory.stat").write_text("anon 3\ninactive_file 2\nactive_file 1\n")
    assert memory.free_bytes() == 1_000_003  # files that were read can go
    (tmp_path / "memory.current").write_text("1\n")
    assert memory.free_bytes() == 1_000_005


@pytest.mark.parametrize("hidden", ["", "/docker/abc"], ids=["whole", "in a container"])
@pytest.mark.parametrize("tightest", ["job", "job/step", "job/step/task"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_all_groups_around_a_process_count(
    tmp_path, monkeypatch, version, tightest, hidden
):
    """As SLURM and systemd nest them. In a container without a namespace of its own the group's
    path begins with what is hidden there."""
    limit, used = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }[version]
    mount = tmp_path / "memory" if version == 1 else tmp_path
    for group in ("", "job", "job/step", "job/step/task", "job/other"):
        (mount / group).mkdir(parents=True, exist_ok=True)
        least = group == ("" if hidden else tightest)
        (mount / group / limit).write_text(f"{1007 if least else 10**6}\n")
        (mount / group / used).write_text("7\n")
    (mount / "job/other" / limit).write_text("8\n")  # not around the process
    own = tmp_path / "own"
    names = "5:cpu,memory:" if version == 1 else "0::"
    own.write_text(f"9:pids:/job/other\n{names}{hidden or '/job/step/task'}\n")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OWN", own)
    assert memory.free_bytes() == 1000


def test_what_was_saved_whole_is_not_cut(monkeypatch):
    """The regulariser's statistics are of a micro-batch: of fewer images, another training. Without
    it, and with contexts that no micro-batch cuts, the rounding alone is another."""
    config = load("demo")
    monkeypatch.setattr(cpu_micro_batch, "most_images", lambda config: 4)
    monkeypatch.setattr(cpu_micro_batch.distributed, "all_gather_objects", lambda mine: [mine])
    assert cpu_micro_batch.fitted(config, CPU, None).data.micro_batch_size == 4
    assert cpu_micro_batch.fitted(config, CPU, config) == config
    plain = load("demo", ["loss.vicreg.beta=0", "mask.context=fixed"])
    assert cpu_micro_batch.fitted(plain, CPU, plain).data.micro_batch_size == 4


@pytest.mark.parametrize("mode", ["per_target", "one_pass"])
@pytest.mark.parametrize("name", ["demo.json", "cifar10_vit_t.json", "vit_b.json", "tiny"])
def test_the_bound_from_the_sizes_holds(name, mode):
    own = [f"predictor.mode={mode}", "run.precision=fp32"]
    config = configured() if name == "tiny" else load(name, own)
    for bound, counted in zip(
        cpu_micro_batch.at_most(config), cpu_micro_batch.needed(config), strict=True
    ):
        assert counted <= bound


def test_where_the_bound_fits_nothing_is_counted(monkeypatch):
    config = configured()
    monkeypatch.setattr(cpu_micro_batch, "needed", None)
    fixed, image = cpu_micro_batch.at_most(config)
    room = int((fixed + 48 * image) / cpu_micro_batch.SHARE)
    monkeypatch.setattr(memory, "free_bytes", lambda: room + 10)
    assert cpu_micro_batch.most_images(config) == 48
    monkeypatch.setattr(memory, "free_bytes", lambda: room - 10)
    with pytest.raises(TypeError):
        cpu_micro_batch.most_images(config)
