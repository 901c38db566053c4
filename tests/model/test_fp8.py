"""The target encoder in FP8: what it computes, how far off its features are, its EMA."""

import copy

import forks
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from test_ema import STEPS, encoder_of, momentum_of, share, trained, walk, whole

from cjepa_fast import config as configuration
from cjepa_fast.config import ConfigError
from cjepa_fast.kernels.fp8 import quantise_gelu, quantise_norm, quantise_rows
from cjepa_fast.model import fp8
from cjepa_fast.model.attention import attend
from cjepa_fast.model.vit import MODELS, Encoder, patchify
from cjepa_fast.runtime import hardware
from cjepa_fast.training import build
from cjepa_fast.training.ema import TargetEMA

# A second thread gains these small matmuls nothing, and waits where the cores are busy.
pytestmark = pytest.mark.usefixtures("one_thread")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def in_8_bits(encoder: Encoder) -> Encoder:
    encoder = copy.deepcopy(encoder).bfloat16().requires_grad_(False)
    fp8.linears_to_fp8(encoder)
    return encoder


# --- the layers


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (1, 48)])
def test_the_matmul_is_that_of_what_the_rows_stand_for(seed, shape):
    x, weight = quantise_rows(torch.randn(shape)), quantise_rows(torch.randn(32, 48))
    bias = torch.randn(32, dtype=torch.bfloat16)
    exact = x.wide().double() @ weight.wide().double().T + bias.double()
    found = fp8.matmul(x, weight, bias)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


def test_fast_sums_lose_the_bits_that_the_accumulator_drops(seed, monkeypatch):
    """By hand: 1 + 2^-13 is kept, and 2^-14 more is lost, again and again."""
    terms = torch.zeros(1, 4 * fp8.INSTRUCTION)
    terms[0, :: fp8.INSTRUCTION] = torch.tensor([1.0, 2.0**-13, 2.0**-14, 2.0**-14])
    assert fp8.short_sums(terms, torch.ones_like(terms)).item() == 1 + 2.0**-13
    assert fp8.short_sums(-terms, torch.ones_like(terms)).item() == -1 - 2.0**-13
    x, weight = (quantise_rows(torch.randn(8, 5120)) for _ in range(2))
    bias = torch.zeros(8, dtype=torch.bfloat16)
    exact = fp8.matmul(x, weight, bias)
    monkeypatch.setattr(fp8, "FAST_SUMS", True)
    assert 5e-4 < relative(fp8.matmul(x, weight, bias), exact) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_the_gpus_matmul_is_the_definitions(seed, monkeypatch, fast, tokens):
    monkeypatch.setattr(fp8, "FAST_SUMS", fast)
    x, weight = quantise_rows(torch.randn(tokens, 1280)), quantise_rows(torch.randn(256, 1280))
    bias = torch.randn(256, dtype=torch.bfloat16)
    wanted = fp8.matmul(x, weight, bias)
    x, weight = (type(rows)(*(part.cuda() for part in rows)) for rows in (x, weight))
    found = fp8.matmul(x, weight, bias.cuda()).cpu()
    assert relative(found, wanted) < (2e-2 if fast else 4e-3)


def test_a_layer_is_a_linear_to_8_bits_of_both_operands(seed):
    linear = torch.nn.Linear(256, 64).bfloat16()
    layer = fp8.FP8Linear(linear)
    x = torch.randn(4, 7, 256).bfloat16()
    assert torch.equal(layer(x), layer(quantise_rows(x)))
    error = relative(layer(x), linear(x))
    assert 0.01 < error < 0.045  # 3.4 % in the mean square; a wrong scale would be far beyond
    again = torch.randn(64, 256).bfloat16()
    address = layer.weight.data_ptr()
    layer.write(again)
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight.float(), quantise_rows(again).values.float())


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_a_block_is_the_bf16_one_with_its_four_matmuls_in_fp8(seed, gelu):
    """Each matmul of the block taken by hand, from the layers' names."""
    encoder = Encoder(24, 4, 48, 1, 3, gelu=gelu, init="xavier").bfloat16()
    ours, block = in_8_bits(encoder).blocks[0], encoder.blocks[0]
    x = 3 * torch.randn(2, 36, 48).bfloat16()

    def linear(rows, layer):
        return fp8.matmul(rows, quantise_rows(layer.weight), layer.bias)

    normed = quantise_norm(x, block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = (
        part.unflatten(-1, (3, 16)).transpose(1, 2)
        for part in linear(normed, block.attn.qkv).chunk(3, -1)
    )
    heads = attend(q, k, v, "plain")
    y = x + linear(quantise_rows(heads.transpose(1, 2).flatten(2)), block.attn.proj)
    normed = quantise_norm(y, block.norm2.weight, block.norm2.bias, 1e-6)
    hidden = quantise_gelu(linear(normed, block.mlp.fc1), gelu)
    assert torch.equal(ours(x), y + linear(hidden, block.mlp.fc2))
    other = quantise_gelu(linear(normed, block.mlp.fc1), {"exact": "tanh", "tanh": "exact"}[gelu])
    assert not torch.equal(ours(x), y + linear(other, block.mlp.fc2))


def test_what_is_in_8_bits_and_what_is_not():
    encoder = in_8_bits(encoder_of())
    dtypes = {name: p.dtype for name, p in encoder.named_parameters()}
    assert dtypes.keys() == dict(encoder_of().named_parameters()).keys()  # the same names
    eight = {name for name, dtype in dtypes.items() if dtype == torch.float8_e4m3fn}
    ends = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    assert eight == {name for name in dtypes if name.endswith(ends)}
    assert {dtypes[name] for name in dtypes.keys() - eight} == {torch.bfloat16}


# --- the features


def pictures(count: int, side: int) -> torch.Tensor:
    """Smooth, as photographs are."""
    coarse = torch.randn(count, 3, side // 8, side // 8)
    return F.interpolate(coarse, size=side, mode="bicubic")


@torch.no_grad()
def feature_error(encoder: Encoder, images: torch.Tensor) -> float:
    """Of the tokens in fp8 against those in bf16, relative."""
    images, plain = images.bfloat16(), copy.deepcopy(encoder).bfloat16()
    return relative(in_8_bits(encoder)(images), plain(images))


def briefly_trained(encoder: Encoder, steps: int) -> Encoder:
    """To tell the pixels of a patch from its token, so that tokens differ as a trained one's do."""
    head = torch.nn.Linear(encoder.width, 3 * encoder.patch_size**2)
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(steps):
        images = pictures(8, encoder.image_size)
        loss = F.smooth_l1_loss(head(encoder(images)), patchify(images, encoder.patch_size))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return encoder


def test_features_of_a_trained_encoder_are_within_2_per_cent():
    """Twelve blocks, of which the training need not be long."""
    torch.manual_seed(0)
    encoder, images = briefly_trained(Encoder(16, 4, 64, 12, 2), 12), pictures(8, 16)
    assert 0.005 < feature_error(encoder, images) < 0.02


def test_features_of_an_untrained_vit_s_are_not():
    """Why bf16 is the default: 4.6 % as it was measured. The two thirds that are not in attention
    give 4.0 %, and no choice of layers but qkv alone would keep it below 2 %."""
    torch.manual_seed(0)
    encoder = Encoder(112, 16, **MODELS["vit_small"])
    assert 0.02 < feature_error(encoder, pictures(1, 112)) < 0.06


# --- the EMA


def ema_of(fp8: bool = True) -> TargetEMA:
    encoder = encoder_of()
    weights = trained(encoder)
    ema = TargetEMA(copy.deepcopy(encoder), whole(weights), torch.bfloat16, fp8=fp8)
    for step in range(STEPS):
        walk(weights, step)
        ema.update(momentum_of(step))
    return ema


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in module.state_dict().items()}


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_the_working_copy_is_the_bf16_one_in_8_bits():
    """And the EMA itself is the one that any precision has."""
    ours, plain = ema_of(), ema_of(fp8=False)
    for fragment, other in zip(ours.fragments, plain.fragments, strict=True):
        assert fragment[:2] == other[:2] and torch.equal(fragment.values, other.values)
        assert fragment.values.dtype == torch.float32
    assert same_state(state(ours.module), state(in_8_bits(plain.module)))


def test_the_working_copy_is_written_anew_from_the_ema():
    """As a restored checkpoint needs it, in the same memory."""
    ours = ema_of()
    wanted = state(ours.module)
    addresses = [p.data_ptr() for p in ours.module.parameters()]
    with torch.no_grad():
        for p in (p for n, p in ours.module.named_parameters() if n != "pos_embed"):
            p.copy_(torch.zeros_like(p))
    assert not same_state(state(ours.module), wanted)
    ours.write_working_copy()
    assert same_state(state(ours.module), wanted)
    assert [p.data_ptr() for p in ours.module.parameters()] == addresses


def worker(rank: int, port: int, out: str) -> None:
    """One of two ranks whose shares meet in the midst of a row."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    encoder = encoder_of()
    weights = trained(encoder)
    shares = share(weights, rank, 2)
    target = copy.deepcopy(encoder)
    ema = TargetEMA(target, shares, torch.bfloat16, dist.group.WORLD, fp8=True)
    for step in range(STEPS):
        walk(weights, step)
        ema.update(momentum_of(step))
    updated = state(ema.module)
    ema.write_working_copy()
    torch.save((updated, state(ema.module)), f"{out}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_shares_that_cut_rows_give_the_same_bits(tmp_path):
    port = tiny.free_port()
    forks.spawn(worker, (port, str(tmp_path)), 2)
    wanted = state(ema_of().module)
    for rank in range(2):
        for found in torch.load(tmp_path / f"rank{rank}.pt"):
            assert same_state(found, wanted)


# --- a run

FP8 = {
    "run": {**tiny.CONFIG["run"], "precision": "bf16"},
    "model": {**tiny.CONFIG["model"], "width": 48, "target_precision": "fp8"},
}


def asking(key: str, run: dict = FP8["run"], **sizes) -> configuration.Config:
    """tiny's configuration with this key "fp8" and no other."""
    model = {**tiny.CONFIG["model"], "width": 48, key: "fp8"} | sizes
    return configuration.validate(tiny.CONFIG | {"run": run, "model": model})


KEYS = pytest.mark.parametrize("key", ["target_precision", "context_precision"])


@KEYS
def test_a_gpu_without_fp8_matmuls_is_told(monkeypatch, key):
    hardware.gpu_multiplies_fp8.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    config = asking(key)
    with pytest.raises(ConfigError, match=rf'{key} = "fp8": .*A100.*sm_80.*sm_89; take "bf16"'):
        build.check_fp8(config, torch.device("cuda", 0))
    build.check_fp8(config, torch.device("cpu"))
    monkeypatch.setattr(hardware, "gpu_multiplies_fp8", lambda device: True)
    build.check_fp8(config, torch.device("cuda", 0))


@KEYS
def test_fp8_wants_bf16_beside_it(key):
    config = asking(key, tiny.CONFIG["run"])
    run = config.run.model_copy(update={"precision": "fp32"})  # as "auto" may become
    resolved = config.model_copy(update={"run": run})
    with pytest.raises(ConfigError, match=r'fp8".*run\.precision = "bf16", which is "fp32" here'):
        build.check_fp8(resolved, torch.device("cpu"))


@KEYS
@pytest.mark.parametrize(
    ("sizes", "said"),
    [({"width": 24}, "model.width = 24"), ({"mlp_ratio": 1.1}, "mlp_ratio = 53")],
)
def test_widths_without_an_fp8_matmul_are_told(sizes, said, key):
    config = asking(key, **sizes)
    with pytest.raises(ConfigError, match=rf"{said}: must be a multiple of 16 for model\.{key} ="):
        build.check_fp8(config, torch.device("cpu"))


@pytest.mark.slow
def test_a_run_in_fp8_resumes_exactly_and_leaves_fp32_encoders(tmp_path):
    config = tiny.write_config(tmp_path, checkpoint={"every_steps": 1, "keep": 9}, **FP8)
    first = tiny.train("--config", config)
    assert first.returncode == 0, first.stderr
    assert "target_precision fp8: right on a CPU" in first.stdout
    held, other = tmp_path / "run" / "checkpoints" / "step_00000003", tmp_path / "other"
    again = tiny.train("--config", config, "--resume", held, "--set", f"run.dir={other}")
    assert again.returncode == 0, again.stderr
    assert tiny.losses(other) == {4: tiny.losses(tmp_path / "run")[4]}
    stored = load_file(tmp_path / "run" / "encoder.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert same_state(stored, load_file(other / "encoder.safetensors"))
    rounded = quantise_rows(stored["blocks.0.mlp.fc1.weight"]).wide()
    assert not torch.equal(stored["blocks.0.mlp.fc1.weight"], rounded)
