"""The target's EMA: in fp32, whole or in pieces, and its rounded working copy."""

import copy

import forks
import pytest
import tiny
import torch
import torch.distributed as dist

from cjepa_fast import config as configuration
from cjepa_fast.config import ConfigError
from cjepa_fast.model.vit import MODELS, Encoder, sincos_positions
from cjepa_fast.training import build, init_from
from cjepa_fast.training.ema import Fragment, TargetEMA, fragment_of

STEPS = 20


def encoder_of(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(12, 3, 16, 2, 2)


def trained(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in module.named_parameters() if "pos_embed" not in name}


def whole(weights: dict[str, torch.Tensor]) -> list[Fragment]:
    return [Fragment(name, 0, p.detach().view(-1)) for name, p in weights.items()]


def share(weights: dict[str, torch.Tensor], rank: int, ranks: int) -> list[Fragment]:
    """As ZeRO cuts: all weights in a row, in equal runs that end in the midst of a parameter."""
    total = sum(p.numel() for p in weights.values())
    low, high = total * rank // ranks, total * (rank + 1) // ranks
    fragments, offset = [], 0
    for name, p in weights.items():
        start, stop = max(low - offset, 0), min(high - offset, p.numel())
        if start < stop:
            fragments.append(Fragment(name, start, p.detach().view(-1)[start:stop]))
        offset += p.numel()
    return fragments


def walk(weights: dict[str, torch.Tensor], step: int) -> None:
    """An optimiser's step: every weight moves by about a learning rate."""
    generator = torch.Generator().manual_seed(100 + step)
    with torch.no_grad():
        for p in weights.values():
            p.add_(1e-3 * torch.randn(p.shape, generator=generator))


def momentum_of(step: int) -> float:
    return 0.9 + 0.1 * step / STEPS


def followed(dtype: torch.dtype, ranks: int = 1, steps: int = STEPS, momentum=momentum_of):
    """The EMA after some steps, by rank, and the same in float64."""
    encoder = encoder_of()
    weights = trained(encoder)
    parts = [whole(weights)] if ranks == 1 else [share(weights, r, ranks) for r in range(ranks)]
    emas = [TargetEMA(copy.deepcopy(encoder), part, dtype) for part in parts]
    exact = {name: p.detach().double().clone() for name, p in weights.items()}
    for step in range(steps):
        walk(weights, step)
        m = momentum(step)
        for ema in emas:
            ema.update(m)
        for name, p in weights.items():
            exact[name] = m * exact[name] + (1 - m) * p.detach().double()
    return emas, exact


def test_ema_against_its_definition():
    (ema,), exact = followed(torch.float32)
    assert {f.name for f in ema.fragments} == exact.keys()
    for name, wanted in exact.items():
        got = ema.module.get_parameter(name).double()
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
        assert not torch.equal(got.float(), encoder_of().get_parameter(name))


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_pieces_are_the_whole(ranks):
    (ema,), _ = followed(torch.float32)
    pieces, _ = followed(torch.float32, ranks)
    covered = {name: torch.zeros(p.numel()) for name, p in trained(ema.module).items()}
    for piece in pieces:
        for name, start, values in piece.fragments:
            wanted = ema.module.get_parameter(name).view(-1)[start : start + len(values)]
            assert torch.equal(values, wanted), (name, start)
            covered[name][start : start + len(values)] += 1
    assert all((count == 1).all() for count in covered.values())


def test_working_copy_is_the_rounded_ema():
    (ema,), _ = followed(torch.bfloat16)
    (plain,), _ = followed(torch.float32)
    assert {p.dtype for p in ema.module.parameters()} == {torch.bfloat16}
    for fragment, whole_fp32 in zip(ema.fragments, plain.fragments, strict=True):
        assert fragment.values.dtype == torch.float32
        assert torch.equal(fragment.values, whole_fp32.values)
        working = fragment_of(ema.module.get_parameter(fragment.name), fragment)
        assert torch.equal(working, fragment.values.bfloat16())


def test_an_ema_kept_in_bf16_would_drift():
    """At momentum 0.999 a step's change is below bf16's rounding: the EMA stands still."""
    (ema,), exact = followed(torch.bfloat16, steps=200, momentum=lambda step: 0.999)
    encoder = encoder_of()
    weights = trained(encoder)
    rounded = {name: p.detach().bfloat16() for name, p in weights.items()}
    for step in range(200):
        walk(weights, step)
        for name, p in weights.items():
            rounded[name].lerp_(p.detach().bfloat16(), 1 - 0.999)
    name = "blocks.1.mlp.fc1.weight"
    ours = next(f.values for f in ema.fragments if f.name == name).double()
    way = (exact[name] - encoder_of().get_parameter(name).double()).abs().mean()
    error = (ours - exact[name].flatten()).abs().mean()
    drift = (rounded[name].double() - exact[name]).abs().mean()
    assert error < 1e-3 * way
    # the rounding that any bf16 copy has, once, is not the drift
    once = (exact[name].bfloat16().double() - exact[name]).abs().mean()
    assert drift > 5 * once and drift > 0.1 * way


def test_momentum_one_keeps_and_zero_copies():
    encoder = encoder_of()
    weights = trained(encoder)
    ema = TargetEMA(copy.deepcopy(encoder), whole(weights), torch.float32)
    before = [f.values.clone() for f in ema.fragments]
    walk(weights, 0)
    ema.update(1.0)
    assert all(torch.equal(f.values, b) for f, b in zip(ema.fragments, before, strict=True))
    ema.update(0.0)
    assert all(torch.equal(ema.module.get_parameter(n), p) for n, p in weights.items())


def test_the_ema_starts_from_the_target_not_from_the_encoder():
    target = encoder_of(seed=1)
    initial = copy.deepcopy(target)
    ema = TargetEMA(target, whole(trained(encoder_of())), torch.float32)
    for fragment in ema.fragments:
        assert torch.equal(fragment.values, initial.get_parameter(fragment.name).flatten())


def test_target_module_is_frozen_and_computes_with_the_ema():
    encoder = encoder_of()
    weights = trained(encoder)
    ema = TargetEMA(copy.deepcopy(encoder), whole(weights), torch.float32)
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    walk(weights, 0)
    ema.update(0.0)
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(ema.module(images), encoder(images))
    assert torch.equal(ema.module.pos_embed, encoder.pos_embed)
    weights["norm.weight"].data.zero_()  # what the optimiser does next stays its own
    assert ema.module.norm.weight.any()


def test_the_target_of_an_ijepa_checkpoint_is_the_ema_s_start(tmp_path, monkeypatch):
    """--set run.init_from: all three networks come from the file, and the EMA continues."""
    small = {"width": 24, "depth": 1, "heads": 3, "mlp_ratio": 4.0}
    monkeypatch.setitem(MODELS, "vit_tiny", small)
    sizes = {"data": {"image_size": 32}, "model": {"name": "vit_tiny", "patch_size": 16}}
    sizes |= {"predictor": {"width": 12, "depth": 1}, "mask": {"min_keep": 1}}
    file = tmp_path / "ijepa.pth.tar"
    config = configuration.validate({**sizes, "run": {"init_from": str(file)}})
    networks = build.build_networks(config)
    target, other = copy.deepcopy(networks.encoder), copy.deepcopy(networks)
    with torch.no_grad():
        for p in trained(other).values():
            p.add_(0.01)
        stored = copy.deepcopy(other.encoder)
        for p in trained(stored).values():
            p.mul_(2)
    parts = {"encoder": other.encoder, "predictor": other.predictor, "target_encoder": stored}
    torch.save({part: module.state_dict() for part, module in parts.items()}, file)
    told = init_from.initialise(networks, target, config)
    assert told == [
        f"weights of {file}, an I-JEPA checkpoint: encoder, predictor and target encoder"
    ]
    for got, wanted in (
        (networks.encoder, other.encoder),
        (networks.predictor, other.predictor),
        (target, stored),
    ):
        state = got.state_dict()
        assert all(torch.equal(state[n], value) for n, value in wanted.state_dict().items())
    for key in ("model.depth", "predictor.mlp_ratio"):  # the file has its own
        section, name = key.split(".")
        other = configuration.validate(
            {**sizes, section: {**sizes[section], name: 3}, "run": {"init_from": str(file)}}
        )
        with pytest.raises(ConfigError, match=f"{key} = 3.*leave it out.*run.init_from"):
            init_from.initialise(networks, target, other)
    by_tanh = {**sizes, "model": {**sizes["model"], "gelu": "tanh"}}
    warned = configuration.validate({**by_tanh, "run": {"init_from": str(file)}})
    anew = build.build_networks(warned)
    *_, line = init_from.initialise(anew, copy.deepcopy(anew.encoder), warned)
    assert line.startswith('WARNING: model.gelu = "tanh"') and anew.encoder.gelu == "tanh"
    ema = TargetEMA(target, whole(trained(networks.encoder)), torch.float32)
    ema.update(0.5)
    for name, p in trained(networks.encoder).items():
        halfway = (p.detach() + stored.get_parameter(name).detach()) / 2
        torch.testing.assert_close(ema.module.get_parameter(name), halfway)


@pytest.fixture
def ijepa_file(tmp_path, monkeypatch):
    """Writes an I-JEPA checkpoint in which one part's positions are moved; the configuration that
    starts from it."""
    small = {"width": 24, "depth": 1, "heads": 3, "mlp_ratio": 4.0}
    monkeypatch.setitem(MODELS, "vit_tiny", small)
    file = tmp_path / "ijepa.pth.tar"

    def write(part: str, move: float, positions: str = "sincos") -> configuration.Config:
        config = configuration.validate({
            "data": {"image_size": 32}, "mask": {"min_keep": 1},
            "model": {"name": "vit_tiny", "patch_size": 16, "positions": positions},
            "predictor": {"width": 12, "depth": 1}, "run": {"init_from": str(file)},
        })  # fmt: skip
        networks = build.build_networks(config)
        states = {
            "encoder": networks.encoder.state_dict(),
            "predictor": networks.predictor.state_dict(),
            "target_encoder": copy.deepcopy(networks.encoder).state_dict(),
        }
        name = "predictor_pos_embed" if part == "predictor" else "pos_embed"
        states[part][name].add_(move)
        torch.save(states, file)
        return config

    return write


def started(config: configuration.Config) -> dict[str, torch.nn.Module]:
    networks = build.build_networks(config)
    target = copy.deepcopy(networks.encoder)
    init_from.initialise(networks, target, config)
    return {"encoder": networks.encoder, "predictor": networks.predictor, "target_encoder": target}


PARTS = ("encoder", "predictor", "target_encoder")


@pytest.mark.parametrize("part", PARTS)
def test_other_positions_of_an_ijepa_checkpoint_are_refused(ijepa_file, part):
    """Fixed ones are in no checkpoint of ours: a resume would change them in silence."""
    ways = {"predictor": "start from its encoder alone: cjepa-export .*ijepa.pth.tar"}
    with pytest.raises(ConfigError, match=ways.get(part, r"set model\.positions=learned")):
        started(ijepa_file(part, move=0.1))


@pytest.mark.parametrize("part", PARTS)
def test_positions_that_differ_by_rounding_stay_as_built(ijepa_file, part):
    found = started(ijepa_file(part, move=5e-6))
    for module in found.values():
        for name, table in module.named_parameters():
            if "pos_embed" in name:
                assert torch.equal(table, sincos_positions(2, 2, table.shape[-1])[None])


def test_learned_positions_start_from_those_of_an_ijepa_checkpoint(ijepa_file):
    found = started(ijepa_file("encoder", move=0.1, positions="learned"))
    wanted = sincos_positions(2, 2, 24)[None]
    assert torch.equal(found["encoder"].pos_embed, wanted + 0.1)
    assert torch.equal(found["target_encoder"].pos_embed, wanted)


def worker(rank: int, port: int, out: str) -> None:
    """One of three ranks of which the last owns nothing, as under ZeRO with few weights."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=3)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        encoder = encoder_of()
        weights = trained(encoder)
        masters = share(weights, rank, 2) if rank < 2 else []
        ema = TargetEMA(copy.deepcopy(encoder), masters, dtype, dist.group.WORLD)
        for step in range(STEPS):
            walk(weights, step)
            ema.update(momentum_of(step))
        found[str(dtype)] = ema.module.state_dict()
    torch.save(found, f"{out}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_ranks_complete_each_others_working_copy(tmp_path):
    port = tiny.free_port()
    forks.spawn(worker, (port, str(tmp_path)), 3)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(3)]
    for dtype in (torch.float32, torch.bfloat16):
        (ema,), _ = followed(dtype)
        for found in ranks:
            for name, wanted in ema.module.state_dict().items():
                assert torch.equal(found[str(dtype)][name], wanted), name
