"""cjepa-plan: its memory against torch's own accounting, its time against the counted work."""

import json
import re

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

from cjepa_fast.config import load, validate
from cjepa_fast.config.load import configs_folder
from cjepa_fast.kernels.vicreg import positions
from cjepa_fast.runtime import distributed
from cjepa_fast.tools import plan
from cjepa_fast.training import build
from cjepa_fast.training.sizes import meta_batch
from cjepa_fast.training.trainer import Trainer

SHIPPED = sorted(path.name for path in configs_folder().glob("*.json"))
DATA = tiny.CONFIG["data"] | {"batch_size": 8}


def configured(precision: str = "fp32", **sections):
    return validate(tiny.CONFIG | {"run": {"precision": precision}, "data": DATA} | sections)


def real_batch(config, images: int) -> tuple[torch.Tensor, ...]:
    masks = build.first_masks(config, images)
    pictures, _, _, tokens = meta_batch(config, masks)
    filled = (torch.randn(x.shape, dtype=x.dtype) for x in (pictures, tokens))
    pictures, tokens = filled
    return pictures, masks.context, masks.target_idx_BMP, tokens


@pytest.mark.parametrize(
    ("precision", "model", "predictor", "context"),
    [
        ("fp32", {}, {}, "random"),
        ("bf16", {}, {}, "random"),
        ("fp32", {}, {}, "packed"),
        ("bf16", {"residual": "fp32"}, {}, "random"),
        ("bf16", {"checkpointing": "norm_gelu"}, {"mode": "one_pass"}, "random"),
        ("fp32", {"checkpointing": "selective"}, {}, "random"),
        ("bf16", {"checkpointing": "selective", "residual": "fp32"}, {"depth": 3}, "random"),
        ("bf16", {"checkpointing": "full"}, {"depth": 3, "mode": "one_pass"}, "random"),
    ],
)
def test_what_is_kept_for_the_backward(precision, model, predictor, context):
    """As torch's profiler counts it: allocated in the forward and not freed."""
    model = {"name": "vit_tiny", "patch_size": 4, "depth": 3} | model
    predictor = tiny.CONFIG["predictor"] | predictor
    mask = {"min_keep": 4, "context": context}
    config = configured(precision, model=model, predictor=predictor, mask=mask)
    with torch.device("meta"):
        meta = build.build_networks(config)
    meta.to(build.compute_dtype(config))
    batch = meta_batch(config, build.first_masks(config, 8))
    counted = plan.kept_bytes(meta, batch, fused_attention=False)
    networks = build.build_networks(config).to(build.compute_dtype(config))
    batch = real_batch(config, 8)
    networks(*batch)  # what is made once is made
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        terms = networks(*batch)
    allocated = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert terms["loss"].requires_grad
    # the CPU's smooth-L1 leaves its mean in the storage of the errors
    allocated -= terms["jepa"].untyped_storage().nbytes()
    assert counted == pytest.approx(allocated, rel=0.1)
    # The meta device keeps bf16 LayerNorm's statistics in fp32, the CPU in bf16.
    real = plan.kept_bytes(networks, batch, fused_attention=False)
    assert counted == pytest.approx(real, rel=0.005)


def test_each_policy_keeps_less_than_the_one_before():
    """And with an fp32 residual stream each keeps more. In bf16, under a fused attention."""
    kept = {}
    for residual in ("bf16", "fp32"):
        for policy in ("none", "norm_gelu", "selective", "full"):
            model = tiny.CONFIG["model"] | {"residual": residual, "checkpointing": policy}
            kept[residual, policy] = plan.plans(configured("bf16", model=model), 1)[0].per_image
    for residual in ("bf16", "fp32"):
        sizes = [size for (of, _), size in kept.items() if of == residual]
        assert sizes == sorted(set(sizes), reverse=True), residual
    for policy in ("none", "norm_gelu", "selective", "full"):
        assert kept["fp32", policy] > kept["bf16", policy]


def test_a_fused_attention_keeps_no_map():
    """A map is B H S S; q, k, v and the output are kept either way."""
    config = configured()
    with torch.device("meta"):
        networks = build.build_networks(config)
    batch = meta_batch(config, build.first_masks(config, 8))
    plain, fused = (plan.kept_bytes(networks, batch, fused_attention=f) for f in (False, True))
    (B, K), (_, M, P) = batch[1].shape, batch[2].shape
    heads = 3
    maps = 4 * heads * (2 * B * K * K + B * M * (K + P) * P)  # the softmax, of two blocks and one
    rows = 4 * heads * (2 * B * K + B * M * P)  # a number a query instead
    scaled = 4 * (
        2 * B * K * 24
    )  # plain attention keeps a scaled q beside, and both take their own
    assert plain - fused == pytest.approx(maps - rows, abs=3 * scaled)
    assert networks(*batch)["loss"].requires_grad  # and the networks are as they were
    assert {block.attn.backend for block in networks.encoder.blocks} == {"auto"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_held_whatever_the_batch(precision):
    config = configured(precision)
    trainer = Trainer(config, distributed.start(0), steps_per_epoch=10)
    counts = [sum(p.numel() for p in part.parameters() if p.requires_grad)
              for part in (trainer.engine.module, trainer.engine.module.encoder)]  # fmt: skip
    found = plan.static_bytes(*counts, precision, 0, 1)
    weights = [p for p in trainer.engine.module.parameters() if p.requires_grad]
    assert found["weights"] == sum(p.nbytes for p in weights)
    states = trainer.engine.state()
    assert found["Adam's moments"] == sum(m.nbytes for s in states for m in s.moments.values())
    if precision == "bf16":
        assert found["fp32 masters"] == sum(s.master.values.nbytes for s in states)
    assert found["gradients"] == found["weights"]
    assert found["EMA"] == sum(f.values.nbytes for f in trainer.ema.fragments)
    copied = [p for n, p in trainer.ema.module.named_parameters() if n != "pos_embed"]
    assert found["its working copy"] == sum(p.nbytes for p in copied)


def test_packed_contexts_keep_no_maps_either():
    """A fused kernel keeps a number a query; the plain way, a map of each padded sequence."""
    config = configured("bf16", mask={"min_keep": 4, "context": "packed"})
    with torch.device("meta"):
        networks = build.build_networks(config).bfloat16()
    batch = meta_batch(config, build.first_masks(config, 8))
    fused, plain = (plan.kept_bytes(networks, batch, fused_attention=f) for f in (True, False))
    sequences, heads = batch[1].sequences, networks.encoder.heads
    maps = 2 * heads * (len(sequences.starts) - 1) * sequences.longest**2  # of one block, bf16
    assert plain - fused > maps * len(networks.encoder.blocks)


def test_sharing_divides_what_the_stage_shares():
    alone = plan.static_bytes(100, 60, "bf16", 0, 4)
    shared = {stage: plan.static_bytes(100, 60, "bf16", stage, 4) for stage in (1, 2, 3)}
    assert shared[1]["Adam's moments"] == alone["Adam's moments"] / 4
    assert shared[1]["weights"] == alone["weights"] == 200 and shared[3]["weights"] == 50
    assert shared[2]["gradients"] == (200 + 400) / 4 < shared[1]["gradients"] < alone["gradients"]
    copies = [shared[stage]["its working copy"] for stage in (1, 2, 3)]
    assert copies == [120, 120, 30]


def test_sums_of_micro_batches_are_in_fp32_under_zero_2_and_3():
    """Which stage 2 updates from, and stage 3 copies; torch's own number elsewhere."""
    for stage, once, summed in ((0, 600, 600), (1, 300, 300), (2, 150, 100), (3, 150, 200)):
        for flag, size in ((False, once), (True, summed)):
            assert plan.static_bytes(100, 60, "bf16", stage, 4, flag)["gradients"] == size
            assert plan.static_bytes(100, 60, "bf16", stage, 1, flag)["gradients"] == 200
            fp32 = plan.static_bytes(100, 60, "fp32", stage, 4, flag)["gradients"]
            assert fp32 == (400 if stage < 2 else 100)


def test_a_plan_of_several_micro_batches_counts_their_sums():
    config = configured("bf16", data=DATA | {"batch_size": 16, "micro_batch_size": 4})
    found = plan.plans(config, 2)[3]  # of 8 images a GPU
    assert found.static["gradients"] == 8 * found.trained / 2
    once = plan.plans(config, 4)[3]
    assert once.static["gradients"] == 6 * once.trained / 4


def test_fp32_is_as_slow_as_the_data_sheet_has_it(tmp_path, capsys):
    def images_per_s(gpu: str, precision: str) -> float:
        words = ["--config", path, "--gpu", gpu, "--set", f"run.precision={precision}"]
        assert plan.main(words) == 0
        return figures(capsys.readouterr().out)["images/s"][0]

    path = str(tiny.write_config(tmp_path))
    for name, gpu in plan.GPUS.items():
        if gpu.precision == "bf16":
            ratio = images_per_s(name, "bf16") / images_per_s(name, "fp32")
            assert ratio == pytest.approx(gpu.tflops / gpu.fp32_tflops, rel=1e-3), name
            assert ratio > 1.9


def test_the_largest_batch_fills_the_memory():
    found = plan.Plan({"weights": 20e9}, 0.5e9, 1)
    gpu = plan.GPU(100, 80, 100, 132, "G")
    batch = plan.largest_batch(found, gpu)
    assert found.total(batch) <= 0.92 * 80e9 < found.total(batch + 1)
    assert plan.largest_batch(found._replace(static={"weights": 90e9}), gpu) == 0


@pytest.mark.parametrize("regulariser", ["vicreg", "sigreg"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_is_planned(name, regulariser, capsys):
    words = ["--config", name, "--gpu", "h100", "--set", f"loss.regulariser={regulariser}"]
    assert plan.main(words) == 0
    assert "saved for backward" in capsys.readouterr().out


@pytest.mark.parametrize("context", ["random", "packed"])
@pytest.mark.parametrize(
    "loss",
    [
        {"vicreg": {"views": "positions"}},
        {"vicreg": {"positions_weight": 1.0, "projector": [20, 12]}},
        {"regulariser": "sigreg"},
        {"regulariser": "sigreg", "sigreg": {"views": "positions", "projector": [20, 12]}},
    ],
)
def test_what_a_regulariser_keeps_is_counted_as_a_processor_keeps_it(loss, context):
    """Beside what a loss without one keeps."""
    counted, real = [], []
    for own in (loss, {"vicreg": {"beta": 0}}):
        config = configured(loss=own, mask={"min_keep": 4, "context": context})
        with torch.device("meta"):
            meta = build.build_networks(config)
        networks, directions = build.build_networks(config), build.meta_directions(config)
        batch = *meta_batch(config, build.first_masks(config, 8)), *directions
        filled = *real_batch(config, 8), *(torch.randn(d.shape) for d in directions)
        counted.append(plan.kept_bytes(meta, batch, fused_attention=False))
        real.append(plan.kept_bytes(networks, filled, fused_attention=False))
    more = real[0] - real[1]
    assert more > 0 and counted[0] - counted[1] == pytest.approx(more, rel=0.005)


def test_vicreg_at_each_position_is_counted_as_our_kernels_keep_it():
    """The deviations and the matrix, not a token's row of a matrix with each position."""
    kept = {}
    for views, beta in (("positions", 0.001), ("blocks", 0)):
        config = configured(loss={"vicreg": {"views": views, "beta": beta}})
        with torch.device("meta"):
            networks = build.build_networks(config)
        batch = meta_batch(config, build.first_masks(config, 8))
        kept[views] = plan.kept_bytes(networks, batch, fused_attention=True)
    (B, K), D, N = batch[1].shape, 24, 36
    z, rows = torch.empty(B * K, D, device="meta"), torch.empty(N, B, device="meta")
    _, _, *saved = positions.position_terms_op(z, rows, 1.0, 1e-4, True)
    assert kept["positions"] - kept["blocks"] == sum(t.nbytes for t in saved)


def figures(text: str) -> dict[str, list[float]]:
    """By name, what stands in the lines of a plan's last part: the figure, and its range."""
    found = {}
    for line in text.split("\n\n")[-1].splitlines():
        values = re.match(r"[\d ,.]+(\([\d,.]+ to [\d,.]+\))?", line[15:])[0]
        numbers = re.findall(r"[\d,.]+", values)
        found[line[:15].strip()] = [float(x.replace(",", "")) for x in numbers]
    return found


def test_time_and_energy_follow_from_the_counted_work(capsys):
    arguments = ["--config", "vit_b", "--gpu", "a100-80", "--count", "8"]
    assert plan.main([*arguments, "--images", "1000000", "--epochs", "100"]) == 0
    text = capsys.readouterr().out
    rows = figures(text)
    gflop, again = plan.gflop_per_image(load("vit_b"))
    assert again == 0 and "assumed" in text
    for at, share in enumerate((0.4, 0.25, 0.5)):
        images_per_s = 8 * share * 312e3 / gflop
        assert rows["images/s"][at] == pytest.approx(images_per_s, rel=1e-3)
        hours = 1e8 / images_per_s / 3600
        slow_last = (0, 2, 1)[at]
        assert rows["hours"][slow_last] == pytest.approx(hours, abs=0.06)
        assert rows["GPU-hours"][slow_last] == pytest.approx(8 * hours, abs=0.6)
        assert rows["kWh"][slow_last] == pytest.approx(hours * 8 * 0.4, abs=0.6)
    override = ["--set", "model.checkpointing=full"]
    again = plan.gflop_per_image(load("vit_b", override[1:]))[1]
    assert plan.main([*arguments, *override]) == 0
    slower = figures(capsys.readouterr().out)
    images_per_s = slower["images/s"][0]
    assert images_per_s == pytest.approx(8 * 0.4 * 312e3 / (gflop + again), rel=1e-3)
    # MFU is of the counted work in those images: what is recomputed is not in it
    assert slower["MFU, %"][0] == pytest.approx(images_per_s * gflop / (8 * 3120), abs=0.06)


@pytest.mark.parametrize("gpu", ["a100-40", "a100-80", "h100", "h200", "b200", "l40s", "4090"])
def test_every_gpu_is_planned_for_and_every_figure_has_its_range(tmp_path, capsys, gpu):
    arguments = ["--config", str(tiny.write_config(tmp_path)), "--gpu", gpu, "--count", "2"]
    assert plan.main(arguments) == 0
    head, memory, times = capsys.readouterr().out.split("\n\n")
    assert f"2 x {gpu}" in head and "fits: " in head and "predicted" in memory.splitlines()[0]
    assert "largest batch a GPU" in memory and "0*" in memory
    rows = figures(times)
    assert all(len(values) == 3 for name, values in rows.items() if name != "recomputed")
    assert "assumed" in times and "measured," not in times


MEASURED_ROW = {
    "config": "vit_b", "overrides": ["mask.context=fixed"], "precision": "bf16", "batch": 256,
    "processes": 1, "mfu_sheet_pct": 47.0, "joules_per_image": 0.2, "commit": "abc",
    "hardware": {"device": "NVIDIA H200"},
}  # fmt: skip


@pytest.fixture
def measured(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(plan.measured_rows([MEASURED_ROW])))
    return path


def speed_of(path, name="vit_b", gpu="h200", count=1, own=("mask.context=fixed",)) -> plan.Speed:
    config = plan.on_gpu(load(name, ["data.batch_size=256", *own]), plan.GPUS[gpu])
    return plan.speed(config, name, plan.GPUS[gpu], count, path)


def test_measured_is_only_the_very_step_that_was(measured):
    found = speed_of(measured, "vit_b.json")
    assert found == plan.Speed(0.47, 0.47, 0.47, "measured, abc", 0.2) and found.measured
    fixed = "mask.context=fixed"
    for other in (
        {"own": ()},
        {"own": (fixed, "run.compile=blocks")},
        {"own": (fixed, "data.batch_size=512")},
        {"own": (fixed, "loss.vicreg.beta=0")},
        {"count": 2},
    ):
        derived = speed_of(measured, **other)
        assert not derived.measured and derived.mfu == 0.47 and derived.low < 0.47 < derived.high
        assert derived.source.startswith("derived: 47.0 % measured of 256 images on 1 x NVIDIA")
        assert derived.joules_per_image is None
    for other in (
        {"own": (fixed, "model.depth=4")},
        {"own": (fixed, "run.precision=fp32")},
        {"gpu": "a100-80"},
        {"name": "vit_h"},
    ):
        assumed = speed_of(measured, **other)
        assert assumed[:3] == plan.ASSUMED_MFU and assumed.source.startswith("assumed")


def test_the_memory_of_the_measured_step_stands_beside_the_counted_one(capsys):
    """Of the very step and of the one that the speed is derived from; of no other GPU's."""
    (row,) = (r for r in json.loads(plan.MEASURED.read_text()) if r["config"] == "vit_h")
    assert row["peak_gib"] == pytest.approx(88.79, abs=0.01)
    said = "measured: torch reserved 95.3 GB (88.8 GiB) for 128 images on 1 x NVIDIA H200, "
    own = [f"--set={override}" for override in row["overrides"]]
    for arguments in (own, [*own, "--set=data.batch_size=128"]):
        assert plan.main(["--config", "vit_h", "--gpu", "h200", *arguments]) == 0
        memory = capsys.readouterr().out.split("\n\n")[1]
        assert said in memory and memory.endswith(f"at commit {row['commit']}")
    assert plan.main(["--config", "vit_h", "--gpu", "a100-80"]) == 0
    assert "torch reserved" not in capsys.readouterr().out


def test_a_file_of_a_shipped_one_s_name_may_be_of_anything(measured, tmp_path):
    """What was measured was of the shipped one."""
    (tmp_path / "vit_b.json").write_text(json.dumps({"model": {"name": "vit_tiny"}}))
    own = str(tmp_path / "vit_b.json")
    config = plan.on_gpu(load(own, ["data.batch_size=256"]), plan.GPUS["h200"])
    assert plan.speed(config, own, plan.GPUS["h200"], 1, measured)[:3] == plan.ASSUMED_MFU


def test_what_moves_memory_to_the_host_is_said_not_to_be_counted():
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "zero_hpz_partition_size": 8}
    less, more = plan.not_counted(zero)
    assert less.startswith("offload_optimizer") and "less" in less and "more" in more
    for size in (1, "auto"):
        assert plan.not_counted({"stage": 3, "zero_hpz_partition_size": size}) == []


def test_rows_without_a_rate_are_not_kept():
    rows = [MEASURED_ROW, MEASURED_ROW | {"mfu_sheet_pct": None}, MEASURED_ROW | {"config": None}]
    (kept,) = plan.measured_rows(rows)
    assert kept["mfu_pct"] == 47.0 and kept["device"] == "NVIDIA H200"


def test_the_shipped_table_is_of_rows_that_are_found_again():
    """Of the present configurations: a key that is gone would make a row nobody's."""
    for row in json.loads(plan.MEASURED.read_text()):
        own = [*row["overrides"], f"data.batch_size={row['batch']}"]
        config = plan.on_gpu(load(row["config"], own), plan.GPUS["h200"])
        assert plan.speed(config, row["config"], plan.GPUS["h200"], 1).measured


def test_the_waves_of_fixed_lengths_are_told():
    def told(*overrides: str) -> list[str]:
        return plan.wave_messages(load("vit_h", overrides), plan.GPUS["h200"])

    fixed = "mask.context=fixed"
    assert "K = 91" in told(fixed)[0] and "K = 85" in told(fixed, "mask.keep=85")[0]
    assert told() == []


def test_a_measured_share_is_of_the_counted_work(measured, monkeypatch, capsys):
    row = MEASURED_ROW | {"overrides": ["mask.context=fixed", "model.checkpointing=full"]}
    measured.write_text(json.dumps(plan.measured_rows([row])))
    monkeypatch.setattr(plan.speed, "__defaults__", (measured,))
    sets = ["mask.context=fixed", "model.checkpointing=full", "data.batch_size=256"]
    words = ["--config", "vit_b", "--gpu", "h200", *(f"--set={one}" for one in sets)]
    assert plan.main(words) == 0
    rows = figures(capsys.readouterr().out)
    gflop, _ = plan.gflop_per_image(load("vit_b", sets))
    assert rows["MFU, %"] == [47.0]
    assert rows["images/s"][0] == pytest.approx(0.47 * 989e3 / gflop, rel=1e-3)


def test_waves_are_of_the_micro_batch_that_a_rank_has(monkeypatch):
    seen = []
    monkeypatch.setattr(plan.waves, "describe", lambda images, *_, **__: seen.append(images))
    config = load("vit_b", ["mask.context=fixed", "data.batch_size=512"])
    for count in (1, 8):
        plan.wave_messages(config, plan.GPUS["h200"], count)
    assert seen == [config.data.micro_batches(1)[0], 64]


def test_the_verdict_says_what_to_change():
    gpu = plan.GPU(100, 10, 100, 132, "G")

    def said(static, per_image):
        plans = {
            stage: plan.Plan({"all": size * 1e9}, per_image * 1e9, 1)
            for stage, size in enumerate(static)
        }
        return plan.verdict(plans, 1, gpu, 16)

    assert said([9, 5, 5, 1], 0.1) == (
        "fits: 6.6 GB of each GPU's 9.2 usable, at ZeRO stage 1; up to 42 images a GPU would"
    )
    assert said([9, 9, 9, 1], 0.1).endswith(
        "try data.micro_batch_size=2 or less; deepspeed.zero_optimization.stage=3; "
        "model.checkpointing, more GPUs, or a smaller model"
    )
    assert said([20, 20, 20, 20], 0.1).endswith("more GPUs with ZeRO stage 3, or a smaller model")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--config", "vit_x"], "vit_x"), (["--config", "vit_b", "--count", "3"], "batch_size")],
)
def test_wrong_settings_are_told(capsys, arguments, named):
    assert plan.main([*arguments, "--gpu", "h200"]) == 2
    assert named in capsys.readouterr().err


def test_what_does_not_fit_is_said(capsys):
    assert plan.main(["--config", "vit_g", "--gpu", "4090", "--count", "1"]) == 0
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(("gpu", "precision"), [("h100", "bf16"), ("t4", "fp32")])
def test_auto_is_what_it_becomes_on_the_planned_gpu(capsys, gpu, precision):
    """Whatever this machine would take."""
    config = validate(tiny.CONFIG | {"data": DATA})
    assert config.run.precision == "auto"
    assert plan.on_gpu(config, plan.GPUS[gpu]).run.precision == precision
    assert plan.main(["--config", "vit_t", "--gpu", gpu]) == 0
    assert "fp32 masters" in capsys.readouterr().out


def test_bf16_is_refused_where_the_planned_gpu_multiplies_none(capsys):
    assert plan.main(["--config", "vit_t", "--gpu", "t4", "--set", "run.precision=bf16"]) == 2
    assert 'run.precision = "bf16": T4 multiplies none' in capsys.readouterr().err
