"""The configuration: what is refused and how it is said, inheritance, and the shipped files."""

import errno
import functools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError

from cjepa_fast import config as configuration
from cjepa_fast.config import Config, ConfigError, load, micro_batches
from cjepa_fast.config.describe import keys
from cjepa_fast.model.loss import CJEPALoss
from cjepa_fast.model.vit import MODELS, count_parameters
from cjepa_fast.training.build import build_masks, build_networks

SHIPPED = sorted(path.name for path in configuration.configs_folder().glob("*.json"))


# What the messages below speak of, whatever the demo's own settings are.
SIZES = (
    "run.epochs=4",
    "data.image_size=96",
    "model.patch_size=12",
    "model.width=192",
    "model.heads=3",
    "predictor.width=96",
)


def refusal(*overrides: str, name: str = "demo.json") -> str:
    with pytest.raises(ConfigError) as refused:
        load(name, [*SIZES, *overrides])
    return str(refused.value)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name, values) makes a file in the working directory, an empty one but for it."""
    monkeypatch.chdir(tmp_path)

    def writer(name: str, values) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return str(path)

    return writer


# --- what is refused: the key, the value, what is allowed


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", ["optim.lrr = 1: no such key", "nearest is optim.lr;", "valid: betas,"]),
        ("optin.lr=1", ['optin = {"lr": 1}: no such key', "nearest is optim;", "checkpoint, data"]),
        ("loss.vicreg.betta=1", ["loss.vicreg.betta = 1", "nearest is loss.vicreg.beta;"]),
        ("data.batchsize=8", ["nearest is data.batch_size;"]),
        ("xyzzy=1", ["xyzzy = 1: no such key", "nearest is "]),
        ("str=1", ["str = 1: no such key", "nearest is ", "checkpoint, data"]),
        ("side=1", ["side = 1: no such key", "nearest is "]),
        ("run.word=5", ["run.word = 5: no such key", "nearest is run."]),
        (
            "model.name=vit_hug",
            ['model.name = "vit_hug"', "'vit_giant'", "did you mean 'vit_huge'"],
        ),
        ("mask.context=prefx", ["'prefix', 'fixed' or 'packed'", "did you mean 'prefix'"]),
        ("mask.sampler=zzz", ['mask.sampler = "zzz"', "'uniform' or 'ijepa'"]),
    ],
)
def test_unknown_words_name_the_nearest(override, said):
    message = refusal(override)
    assert all(part in message for part in said), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr=fast", 'optim.lr = "fast": input should be a valid number'),
        ("run.epochs=1.5", "run.epochs = 1.5: input should be a valid integer"),
        ("run.epochs=true", "run.epochs = true: input should be a valid integer"),
        ("data.flip=1", "data.flip = 1: input should be a valid boolean"),
        ("data.path=7", "data.path = 7: input should be a valid string"),
        ("data=7", "data = 7: input should be an object"),
        ("data=null", "data = null: input should be an object"),
        ("deepspeed=3", "deepspeed = 3: input should be an object"),
        ("data.image_size=wide", 'data.image_size = "wide": input should be a valid integer'),
        ("data.image_size=[96]", "data.image_size.1 = [96]: field required"),
        ("data.image_size=[96,96,3]", "data.image_size = [96, 96, 3]: tuple should have at most 2"),
        ("data.mean=[1,2]", "data.mean = [1.0, 2.0]: data.channels = 3 wants 3 numbers, such as"),
        ("data.std=[1,2,3,4]", "data.std = [1.0, 2.0, 3.0, 4.0]: data.channels = 3 wants 3"),
        ("data.mean=[]", "data.mean = []: data.channels = 3 wants 3 numbers"),
        ("data.channels=0", "data.channels = 0: input should be greater than or equal to 1"),
        ("mask.target_scale=0.2", "mask.target_scale = 0.2: input should be a valid array"),
    ],
)
def test_wrong_types(override, said):
    assert refusal(override).startswith(said)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.image_size=100", "multiple of model.patch_size = 12, such as 96"),
        ("data.image_size=5", "such as 12"),
        (
            "data.image_size=[96,100]",
            "[96, 100]: must be a multiple of model.patch_size = 12, such",
        ),
        ("data.image_size=[100,100]", "data.image_size = 100: must be a multiple"),
        ("data.image_size=[5,50]", "such as [12, 48]"),
        ("data.image_size=[96,0]", "data.image_size.1 = 0: input should be greater than or equal"),
        ("mask.min_keep=64", "mask.min_keep = 64: the grid has only 64 patches"),
        ("optim.warmup_epochs=5", "optim.warmup_epochs = 5: longer than the run; at most"),
        ("mask.target_scale=[0.3,0.2]", "mask.target_scale = [0.3, 0.2]: the first must not"),
        ("mask.target_aspect=[2,1]", "mask.target_aspect = [2.0, 1.0]: the first"),
        ("mask.context_scale=[1,0.9]", "mask.context_scale = "),
        ("data.crop_scale=[0.5,0.4]", "data.crop_scale = "),
        ("data.crop_ratio=[1,0.5]", "data.crop_ratio = "),
        ("data.crop_scale=[0,1]", "data.crop_scale.0 = 0: input should be greater than 0"),
        ("data.crop_scale=[0.5,1.5]", "data.crop_scale.1 = 1.5: input should be less than or"),
        ("data.std=[0,1,1]", "data.std.0 = 0: input should be greater than 0"),
        ("optim.lr=0", "optim.lr = 0: input should be greater than 0"),
        ("optim.lr=Infinity", "optim.lr = Infinity: input should be a finite number"),
        ("optim.lr=NaN", "optim.lr = NaN: input should be"),
        ("optim.betas=[0.9,1.0]", "optim.betas.1 = 1.0: input should be less than 1"),
        ("optim.momentum=1.1", "optim.momentum = 1.1: input should be less than or equal to 1"),
        ("loss.vicreg.beta=-1", "loss.vicreg.beta = -1: input should be greater than or equal"),
        ("run.seed=-1", "run.seed = -1: input should be greater than or equal to 0"),
        (f"run.seed={2**64}", f"run.seed = {2**64}: input should be less than"),
        ("run.epochs=0", "run.epochs = 0: input should be greater than or equal to 1"),
        ("mask.targets=0", "mask.targets = 0: input should be greater than or equal to 1"),
        ("model.heads=5", "model.width = 192: must be a multiple of model.heads = 5"),
        ("model.width=198", "model.width = 198: must be a multiple of 4"),
        ("predictor.width=90", "predictor.width = 90: must be a multiple of 4"),
        ("predictor.heads=5", "predictor.width = 96: must be a multiple of predictor.heads = 5"),
        ("deepspeed.train_batch_size=8", "deepspeed.train_batch_size = 8: set data.batch_size"),
        ("deepspeed.optimizer.type=Adam", 'deepspeed.optimizer = {"type": "Adam"}: set optim'),
        ("deepspeed.fp16.enabled=true", "deepspeed.fp16.enabled = true: set run.precision"),
        ("deepspeed.fp16.enabled=1", "deepspeed.fp16.enabled = 1: set run.precision"),
        ("deepspeed.fp16=true", "deepspeed.fp16 = true: must be an object"),
        ("run.dir=", 'run.dir = "": an empty path is the current folder'),
        ('run.dir="  "', 'run.dir = "  ": an empty path'),
        (
            "deepspeed.zero_optimisation.stage=3",
            'deepspeed.zero_optimisation = {"stage": 3}: DeepSpeed has no such key, and would '
            "ignore it; nearest is deepspeed.zero_optimization",
        ),
        ("deepspeed.stage=3", "nearest is deepspeed.zero_optimization.stage"),
        ("deepspeed.gradient_cliping=1", "nearest is deepspeed.gradient_clipping"),
        ("deepspeed.zero_optimization.zero_hpz_partition_size=all", '= "all": must be a whole'),
        ("deepspeed.zero_optimization.zero_hpz_partition_size=null", "= null: must be a whole"),
        (
            "deepspeed.zero_optimization.stage=4",
            "deepspeed.zero_optimization.stage = 4: must be 0,",
        ),
        ('deepspeed.zero_optimization.stage="2"', 'stage = "2": must be 0, 1, 2 or 3'),
        ("deepspeed.zero_optimization=2", "deepspeed.zero_optimization = 2: must be an object"),
    ],
)
def test_impossible_values(override, said):
    message = refusal(override)
    assert said in message and message.startswith(override.split("=")[0].split(".")[0])


def test_an_oblong_s_grid_must_hold_the_masks():
    few = refusal("data.image_size=[24,48]")
    assert few.startswith("mask.min_keep = 10: the grid has only 8 patches")
    thin = ("data.image_size=[12,480]", "mask.min_keep=4")
    assert "its 1 x 40 patches leave no room" in refusal(*thin, 'mask.sampler="ijepa"')
    load("demo.json", [*SIZES, *thin])


def test_channels_decide_how_many_means_there_are():
    four = ("data.channels=4", "data.mean=[0.5,0.5,0.5,0.5]", "data.std=[1,1,1,1]")
    assert load("demo.json", [*SIZES, *four]).data.mean == (0.5,) * 4
    said = refusal("data.channels=5")
    assert "data.mean = [" in said and "data.std = [" in said and "wants 5 numbers" in said
    assert refusal(*four, "data.colour=0.4").startswith(
        "data.colour = 0.4: colour jitter is of RGB"
    )


def test_a_square_is_one_number_however_it_is_written():
    """So all that follows from the configuration is the same, to the bit."""
    one, two = (load("demo.json", [*SIZES, f"data.image_size={s}"]) for s in ("96", "[96, 96]"))
    assert one == two and one.to_json() == two.to_json()
    oblong = load("demo.json", [*SIZES, "data.image_size=[48,96]"])
    assert oblong.data.image_size == (48, 96)
    assert configuration.validate(json.loads(oblong.to_json())) == oblong


def test_something_must_be_trained_on():
    nothing = ["loss.prediction_weight=0", "loss.vicreg.beta=0"]
    with pytest.raises(ConfigError, match=r"loss\.prediction_weight = 0: with loss\.vicreg\.beta"):
        load("vit_t", nothing)
    for override in nothing:
        load("vit_t", [override])


def test_positions_are_taken_once():
    both = ["loss.vicreg.views=positions", "loss.vicreg.positions_weight=0.1"]
    with pytest.raises(ConfigError, match=r"positions_weight = 0\.1: with .* they are there"):
        load("vit_t", both)


def test_packed_contexts_want_a_kernel_of_varying_lengths():
    both = ["mask.context=packed", "model.attention=sdpa_cudnn"]
    with pytest.raises(ConfigError, match=r'model\.attention = "sdpa_cudnn".*"packed".*"auto"'):
        load("vit_t", both)
    for override in both:
        load("vit_t", [override])


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ("model.target_precision=fp8", "run.precision=fp32", "; set that to"),
        ("model.context_precision=fp8", "run.precision=fp32", "; set that to"),
        ("run.target_stream=true", "run.compile=whole", '; take "blocks"'),
        ("run.weight_stream=true", "run.compile=blocks", '; set that to "none"'),
        ("run.weight_stream=true", "run.precision=fp32", '; set that to "bf16"'),
        ("run.weight_stream=true", "mask.context=packed", '; set that to "fixed"'),
    ],
)
def test_settings_that_exclude_each_other(one, other, said):
    load("demo.json", [one])
    message = refusal(one, other)
    key, value = other.split("=")
    assert message.startswith(one.split("=")[0]) and said in message
    assert f'not with {key} = "{value}"' in message


def test_all_that_is_wrong_is_said_at_once():
    message = refusal("optim.lrr=1", "run.epochs=0", "data.flip=3")
    assert len(message.splitlines()) == 3
    assert len(refusal("data.image_size=100", "optim.warmup_epochs=9").splitlines()) == 2


@pytest.mark.parametrize(
    ("override", "key"),
    [("model.heads=5", "model.width"), ("predictor.width=100", "predictor.width")],
)
def test_sizes_that_the_models_name_decides_are_refused_by_key(override, key):
    config = load("vit_t.json", [override])
    with torch.device("meta"), pytest.raises(ConfigError, match=f"{key} = [0-9]+: must be a mult"):
        build_networks(config)


def test_auto_is_left_to_the_other_sections():
    load("demo", ['deepspeed.train_batch_size="auto"', "deepspeed.fp16.enabled=false"])
    load("demo", ["deepspeed.fp16.enabled=auto", "deepspeed.fp16.enabled=0", "run.dir=."])


# --- overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        ("data.path=/my/images", "data.path", "/my/images"),
        ("data.path=a=b", "data.path", "a=b"),
        ('data.path="7"', "data.path", "7"),
        ("data.flip=true", "data.flip", True),
        ("mask.target_scale=[0.1, 0.3]", "mask.target_scale", (0.1, 0.3)),
        ("loss.vicreg.projector=[64,32]", "loss.vicreg.projector", (64, 32)),
        ("loss.vicreg.projector=null", "loss.vicreg.projector", None),
        ("deepspeed.zero_optimization.stage=3", "deepspeed.zero_optimization.stage", 3),
        ("deepspeed.timers.of.theirs=[1]", "deepspeed.timers.of.theirs", [1]),
    ],
)
def test_overrides(override, path, value):
    found = load("demo", [override])
    for part in path.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value and type(found) is type(value)


def test_the_last_override_holds_and_the_rest_stays():
    config = load("demo", ["optim.lr=1e-4", "optim.lr=2e-4"])
    assert config.optim.lr == 2e-4
    assert config == load("demo").model_copy(update={"optim": config.optim})


def test_keys_of_a_section_leave_its_others():
    one = load("demo", ['optim={"lr":2e-4}', 'loss={"vicreg":{"beta":0}}'])
    assert one == load("demo", ["optim.lr=2e-4", "loss.vicreg.beta=0"])


@pytest.mark.parametrize("override", ["optim.lr", "=3", ""])
def test_an_override_without_key_or_value(override):
    assert f"--set {override}: write it as section.key=value" == refusal(override)


def test_an_override_below_a_value():
    assert "path is a value, it has no key below it" in refusal("data.path.x=1")


# --- files


@pytest.mark.parametrize("name", ["x" * 300, f"there/{'y' * 5000}"])
def test_a_name_that_no_file_can_have_is_told_shortened(name):
    with pytest.raises(ConfigError, match=f"--config {name[:20]}.*: no such file here") as refused:
        load(name)
    assert len(str(refused.value)) < 1000


def test_a_file_that_may_not_be_read_is_named(write, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    one = write("one.json", {})
    write("over.json", {"extends": "z" * 300})
    with pytest.raises(ConfigError, match="--config zzz"):
        load("over")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"one\.json: cannot be read: Permission denied"):
        load(one)
    is_file = Path.is_file  # refused as in a folder that may not be looked into
    refused = lambda path: refuse() if "one.json" in path.name else is_file(path)  # noqa: E731
    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(ConfigError, match=r"one\.json: no such file"):
        load(one)


def test_the_working_directory_comes_before_configs(write):
    assert load("vit_t").model.name == "vit_tiny"
    write("vit_t.json", {"model": {"name": "vit_small"}})
    assert load("vit_t.json").model.name == load("vit_t").model.name == "vit_small"


def test_extends_lays_values_over(write):
    write("base.json", {"optim": {"lr": 2e-3, "start_lr": 0.0}, "deepspeed": {"aio": {"b": 1}}})
    write("middle.json", {"extends": "base.json", "optim": {"lr": 3e-3}, "run": {"epochs": 40}})
    child = write("child.json", {"extends": "middle", "deepspeed": {"aio": {"c": 2}}})
    config = load(child)
    assert (config.optim.lr, config.optim.start_lr, config.run.epochs) == (3e-3, 0.0, 40)
    assert config.deepspeed == {"aio": {"b": 1, "c": 2}}


def test_extends_looks_beside_the_file_then_in_configs(write):
    write("sub/near.json", {"run": {"seed": 7}})
    beside = write("sub/one.json", {"extends": "near.json"})
    shipped = write("sub/two.json", {"extends": "vit_b.json", "optim": {"lr": 5e-4}})
    assert load(beside).run.seed == 7
    config = load(shipped)
    assert (config.model.name, config.optim.lr, config.run.epochs) == ("vit_base", 5e-4, 600)


@pytest.mark.parametrize("ring", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_extends_in_a_circle(write, ring):
    for name, parent in zip(ring, ring[1:] + ring[:1], strict=True):
        write(f"{name}.json", {"extends": f"{parent}.json"})
    assert '"extends" goes in a circle' in refusal(name="a.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON: nested too deeply"),
        ('{"run": {"seed": %s}}' % ("1" * 5000), "not JSON"),
        ('{"deepspeed": {"a": %s}}' % ("[" * 300 + "]" * 300), "recursion limit"),
        ("[1]", "must hold a JSON object"),
        ('{"extends": "no"}', "no such file"),
        (
            '{"run": {"seed": 1,\n "epochs": 2,\n "se\\u0065d": 3}}',
            '"seed" stands twice in one object, in lines 1 and 3',
        ),
        ('{"run": {},\n "data": {"path": "a: {"},\n\n"run": {}}', '"run" stands twice'),
    ],
)
def test_files_that_are_no_configuration(write, text, said):
    assert said in refusal(name=write("bad.json", text))


def test_one_key_in_several_objects_is_none_twice(write):
    text = '{"model": {"width": 64, "heads": 4}, "predictor": {"width": 64, "heads": 4}}'
    assert load(write("good.json", text)).predictor.width == 64


NUMBERS = [k.path for k in keys() if re.search(r"(?<!any )\b(number|integer)\b", k.values)]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [1e300, -1e300, 10**30, -(10**30)])
def test_every_number_has_bounds(key, value):
    """A slip of a key would else end the process, or overflow, far from where it was made."""
    values: list = [value]
    default = functools.reduce(lambda node, name: getattr(node, name), key.split("."), Config())
    if isinstance(default, tuple):
        values = [value] * len(default)
    elif key.endswith("projector"):
        values = [value]
    text = json.dumps(values if isinstance(default, tuple) or "projector" in key else value)
    message = refusal(f"{key}={text}")
    assert message.startswith(key) and "input should be" in message, message


def test_thousands_of_threads_are_refused_and_none_of_the_shipped_values_is():
    assert "less than or equal to 1024" in refusal("data.threads=100000")
    assert refusal("run.timeout_s=1e300").startswith("run.timeout_s = 1e+300: input should be")
    assert all(load(name) for name in SHIPPED)


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000, "1e999"])
def test_values_of_any_depth_and_length_are_refused_in_a_line(value):
    message = refusal(f"run.seed={value}")
    assert message.startswith("run.seed = ") and len(message) < 400


def test_a_missing_file_names_those_there_are():
    message = refusal(name="nope.json")
    assert "--config nope.json: no such file" in message
    assert all(name in message for name in SHIPPED)


def test_a_configuration_is_frozen_and_survives_its_own_json(write):
    config = load("vit_g", ["loss.vicreg.projector=[8,8]"])
    for section, key in ((config, "run"), (config.optim, "lr"), (config.loss.vicreg, "beta")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, getattr(section, key))
    assert load(write("copy.json", config.to_json())) == config


def test_the_run_folder_bears_the_files_name(write):
    assert load("demo").run.dir == "runs/demo"
    assert load(write("mine.json", {"run": {"dir": "x/{config}/y"}})).run.dir == "x/mine/y"
    write("lr0.5.json", {"run": {"dir": "x/{config}/y"}})
    assert load("lr0.5").run.dir == "x/lr0.5/y"


def test_values_from_python_are_taken_as_json_has_them():
    over = {
        "data.path": [Path("/a"), "b"], "run.dir": Path("/runs/x"), "run.epochs": np.int64(3),
        "optim.lr": np.float32(0.5), "optim.betas": (0.5, torch.tensor(0.25)),
        "data.flip": np.bool_(True),
    }  # fmt: skip
    made = configuration.from_values("demo", over | {"optim.warmup_epochs": 1})
    assert (made.data.path, made.run.dir, made.run.epochs) == (("/a", "b"), "/runs/x", 3)
    assert (made.optim.lr, made.optim.betas, made.data.flip) == (0.5, (0.5, 0.25), True)


@pytest.mark.parametrize("value", [object(), b"x", np.ones(3), {"a", "b"}])
def test_a_value_that_json_has_none_of_is_named(value):
    with pytest.raises(ConfigError, match=r"^data.path = .*: of type \w+; give a number, a text"):
        configuration.from_values("demo", {"data.path": value})


def test_a_configuration_with_a_rate_by_the_batch_alone_can_be_laid_over():
    given = Config(optim={"lr_per_256": 1e-3})
    assert configuration.from_values(given, {"data.batch_size": 512}).optim.lr == pytest.approx(
        2e-3
    )


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "marked.json").write_text('{"run": {"epochs": 77}}', encoding="utf-8-sig")
    assert load(str(tmp_path / "marked.json"), ["optim.warmup_epochs=1"]).run.epochs == 77


def test_a_number_for_a_text_and_bytes_that_are_no_text_name_the_way_out():
    assert "--set 'run.dir=\"20240501\"'" in refusal("run.dir=20240501")
    assert load("demo.json", ['run.dir="20240501"']).run.dir == "20240501"
    said = refusal(f"data.path={os.fsdecode(b'caf' + bytes([233]))}")
    assert said.startswith("data.path = caf\\xe9: has bytes that are no UTF-8")


def test_paths_expand(monkeypatch):
    monkeypatch.setenv("IMAGES", "/images")
    monkeypatch.setenv("HOME", "/home/me")
    assert configuration.expand_path("~/$IMAGES/${IMAGES}") == "/home/me//images//images"


@pytest.mark.parametrize("key", ["run.dir", "data.path", "eval.online.test"])
@pytest.mark.parametrize(
    ("path", "named"),
    [("$NO_SUCH/x", "$NO_SUCH: this variable"), ("a/${NO_SUCH}", "${NO_SUCH}: this variable"),
     ("~no_such_user_here/x", "~no_such_user_here: no such user")],
)  # fmt: skip
def test_what_stays_in_a_path_is_refused(key, path, named, monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    config = configuration.from_values({}, {key: path})  # it can be read
    with pytest.raises(ConfigError) as refused:
        configuration.check_paths_set(config)
    assert str(refused.value).startswith(f'{key} = "{path}": {named}')


@pytest.mark.parametrize("key", ["run.dir", "data.path"])
def test_a_path_of_nothing_but_an_empty_variable_is_refused(key, monkeypatch):
    """It would be the current folder."""
    monkeypatch.setenv("EMPTY", "")
    config = configuration.from_values({}, {key: "$EMPTY"})
    with pytest.raises(ConfigError, match=f'{key} = "[$]EMPTY": is empty'):
        configuration.check_paths_set(config)


def test_a_path_that_is_there_under_such_a_name_is_taken(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    (tmp_path / "$NO_SUCH").mkdir()
    configuration.check_paths_set(
        configuration.from_values({}, {"data.path": [str(tmp_path / "$NO_SUCH")]})
    )
    with pytest.raises(ConfigError):
        configuration.check_paths_set(
            configuration.from_values({}, {"data.path": ["x", "$NO_SUCH"]})
        )


# --- micro-batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 7, 12])
@pytest.mark.parametrize("limit", [1, 5, 8, 64, 10**6])
def test_micro_batches_make_up_the_batch_in_the_fewest_steps(world_size, limit):
    for share in (1, 7, 60, 64, 97):
        micro, times = micro_batches(share * world_size, world_size, limit)
        assert micro * times * world_size == share * world_size and micro <= limit
        fewer = [n for n in range(1, times) if share % n == 0 and share // n <= limit]
        assert not fewer


def test_micro_batches_of_known_runs():
    assert micro_batches(2048, 16, 128) == (128, 1)
    assert micro_batches(2048, 8, 128) == (128, 2)
    assert micro_batches(2046, 3, 128) == (62, 11)  # 682 = 2 * 11 * 31


@pytest.mark.parametrize(("batch", "world", "near"), [(2048, 3, 2040), (2, 3, 3), (64, 7, 56)])
def test_a_batch_that_does_not_divide(batch, world, near):
    with pytest.raises(ConfigError, match=rf"data.batch_size = {batch}: .* {world} .* {near}$"):
        micro_batches(batch, world, 8)


def test_shares_that_divide_into_small_micro_batches_alone_are_told():
    def told(batch: int, ranks: int, limit: int = 128) -> str | None:
        data = {"batch_size": batch, "micro_batch_size": limit}
        return configuration.micro_batch_message(configuration.validate({"data": data}), ranks)

    line = told(2045, 5)  # 409 is a prime
    assert line.startswith("WARNING: micro-batches of 1: the 409 images a rank takes of data.")
    assert line.endswith(
        "divide into no larger ones of at most 128; data.batch_size=1920 gives 128"
    )
    assert "micro-batches of 62" in told(2046, 3)  # 682 = 2 * 11 * 31
    assert told(1920, 5) is told(2010, 5) is told(2046, 1, 1000) is told(2, 1) is None


@pytest.mark.parametrize(("start_lr", "warmup", "told"), [(2e-3, 5, True), (2e-3, 0, False),
                                                         (1e-3, 5, False)])  # fmt: skip
def test_a_warm_up_that_falls_is_told_and_not_refused(start_lr, warmup, told):
    optim = {"lr": 1e-3, "start_lr": start_lr, "warmup_epochs": warmup}
    line = configuration.warmup_message(configuration.validate({"optim": optim}))
    assert (line is not None) == told
    assert not told or line.startswith("WARNING: optim.start_lr = 0.002 is above optim.lr = 0.001")


# --- what is shipped

# width, depth, heads, predictor depth, epochs, patch and image of C-JEPA's and I-JEPA's runs
TABLE = {
    "vit_t.json": (192, 12, 3, 6, 600, 16, 224),
    "vit_s.json": (384, 12, 6, 6, 600, 16, 224),
    "vit_b.json": (768, 12, 12, 6, 600, 16, 224),
    "vit_l.json": (1024, 24, 16, 12, 600, 16, 224),
    "vit_h.json": (1280, 32, 16, 12, 300, 14, 224),
    "vit_h_448.json": (1280, 32, 16, 12, 300, 16, 448),
    "vit_g.json": (1408, 40, 16, 16, 300, 16, 224),
    "ijepa_h.json": (1280, 32, 16, 12, 300, 14, 224),
}
SMALL = {
    "demo.json", "cifar10_vit_t.json", "cifar10_vit_t_long.json", "imagenette128_vit_s.json",
}  # fmt: skip
# Encoders of the known ViTs at patch 16: published counts minus class token, positions and head.
MILLIONS = {"vit_t.json": 5.486, "vit_s.json": 21.590, "vit_b.json": 85.647, "vit_l.json": 303.099}


def test_model_names_are_those_of_the_encoder():
    assert tuple(MODELS) == configuration.MODEL_NAMES


def test_every_promised_configuration_is_there():
    assert set(SHIPPED) == TABLE.keys() | SMALL


@pytest.mark.parametrize("name", SHIPPED)
def test_every_configuration_builds(name):
    config = load(name)
    with torch.device("meta"):
        networks = build_networks(config)
    encoder, predictor = networks.encoder, networks.predictor
    side = config.data.image_size // config.model.patch_size
    assert encoder.grid == (side, side) == build_masks(config).grid
    assert predictor.predictor_pos_embed.shape == (1, side * side, config.predictor.width)
    assert {b.attn.heads for b in predictor.predictor_blocks} == {encoder.heads}
    for world_size in (1, 2, 8, 16):
        micro_batches(config.data.batch_size, world_size, config.data.micro_batch_size)
    assert networks.projector is None


@pytest.mark.parametrize("name", TABLE)
def test_sizes_of_the_table(name):
    config = load(name)
    with torch.device("meta"):
        networks = build_networks(config)
    encoder = networks.encoder
    found = (encoder.width, encoder.depth, encoder.heads, len(networks.predictor.predictor_blocks))
    found += (config.run.epochs, encoder.patch_size, encoder.image_size)
    assert found == TABLE[name]
    assert config.predictor.width == 384
    hidden = 6144 if name == "vit_g.json" else 4 * encoder.width
    assert encoder.blocks[0].mlp.fc1.out_features == hidden
    if name in MILLIONS:
        assert count_parameters(encoder) / 1e6 == pytest.approx(MILLIONS[name], abs=5e-4)


@pytest.mark.parametrize("name", TABLE)
def test_the_recipe_of_the_table(name):
    config = load(name)
    optim, mask, vicreg = config.optim, config.mask, config.loss.vicreg
    huge = config.model.name in ("vit_huge", "vit_giant")
    assert config.data.batch_size == 2048
    assert (optim.start_lr, optim.warmup_epochs) == ((2e-4, 40) if huge else (1e-4, 15))
    assert (optim.lr, optim.final_lr) == (1e-3, 1e-6)
    assert (optim.weight_decay, optim.final_weight_decay) == (0.04, 0.4)
    assert (optim.momentum, optim.final_momentum, optim.betas) == (0.996, 1.0, (0.9, 0.999))
    assert (config.data.crop_scale, config.data.flip, config.data.colour) == ((0.3, 1.0), False, 0)
    assert (mask.targets, mask.min_keep, mask.context_scale) == (4, 10, (0.85, 1.0))
    assert (mask.target_scale, mask.target_aspect) == ((0.15, 0.2), (0.75, 1.5))
    baseline = name == "ijepa_h.json"
    assert vicreg.beta == (0.0 if baseline else 0.001)
    assert (vicreg.sim, vicreg.std, vicreg.cov, vicreg.views) == (25.0, 25.0, 1.0, "blocks")
    modes = ("ijepa", "prefix") if baseline else ("uniform", "random")
    assert (mask.sampler, mask.context) == modes


def test_the_loss_gets_every_key_of_its_section():
    config = load("vit_t", [
        "loss.prediction=l2", "loss.vicreg.views=tokens", "loss.vicreg.beta=0.5",
        "loss.vicreg.sim=2", "loss.vicreg.std=3", "loss.vicreg.cov=4", "loss.vicreg.gamma=5",
        "loss.vicreg.eps=0.25", "loss.vicreg.positions_weight=0.5", "loss.vicreg.projector=[8,6]",
        "loss.prediction_weight=0.75",
    ])  # fmt: skip
    with torch.device("meta"):
        networks = build_networks(config)
    wanted = CJEPALoss("l2", 0.75, "tokens", beta=0.5, sim=2, std=3, cov=4, gamma=5, eps=0.25,
                        positions_weight=0.5)  # fmt: skip
    assert networks.loss == wanted
    assert [p.shape[0] for p in networks.projector.parameters() if p.dim() == 2] == [8, 6]


def test_without_vicreg_no_projector_is_built():
    """At beta 0 nothing would train it."""
    config = load("vit_t", ["loss.vicreg.beta=0", "loss.vicreg.projector=[8]"])
    with torch.device("meta"):
        assert build_networks(config).projector is None


def test_own_sizes_replace_the_named_models():
    config = load("vit_t", ["model.depth=2", "model.mlp_ratio=3", "predictor.heads=6"])
    with torch.device("meta"):
        networks = build_networks(config)
    encoder = networks.encoder
    assert (encoder.width, encoder.depth, encoder.heads, encoder.mlp_ratio) == (192, 2, 3, 3.0)
    assert networks.predictor.predictor_blocks[0].attn.heads == 6
    assert (encoder.mean, encoder.std) == (config.data.mean, config.data.std)
    assert math.prod(encoder.blocks[0].mlp.fc1.weight.shape) == 192 * 576


def test_a_rate_for_256_images_follows_the_batch():
    over = ["optim.lr_per_256=0.001", "optim.start_lr=1e-5"]
    for batch, rate in ((256, 0.001), (64, 0.00025), (1024, 0.004)):
        made = load("vit_b", [*over, f"data.batch_size={batch}"])
        assert made.optim.lr == rate
        kept = json.loads(made.to_json())
        assert (kept["optim"]["lr"], kept["optim"]["lr_per_256"]) == (rate, 0.001)
        assert configuration.validate(kept) == made  # as config.json is read again
        assert configuration.from_values(made, {"data.batch_size": 2 * batch}).optim.lr == 2 * rate
    assert load("vit_b").optim.lr_per_256 is None
    assert "0.000125 for a batch of 2048" in configuration.lr_message(
        load("vit_b", ["optim.lr_per_256=0.000125"])
    )
    assert configuration.lr_message(load("vit_b")) is None


def test_of_two_files_the_later_rate_counts(write):
    write("a.json", {"extends": "vit_b.json", "optim": {"lr_per_256": 0.001}})
    write("b.json", {"extends": "a.json", "data": {"batch_size": 512}})
    write("c.json", {"extends": "b.json", "optim": {"lr": 0.5}})
    assert load("b.json").optim.lr == 0.002
    assert load("c.json").optim.lr == 0.5 and load("c.json").optim.lr_per_256 is None
    assert load("b.json", ["optim.lr=0.25"]).optim.lr == 0.25
    assert load("c.json", ["optim.lr_per_256=0.002"]).optim.lr == 0.004
    assert configuration.from_values("c.json", {"optim.lr_per_256": 0.002}).optim.lr == 0.004


def test_two_rates_at_one_place_are_refused(write):
    write("a.json", {"optim": {"lr": 0.5, "lr_per_256": 0.001}})
    for make in (
        lambda: load("a.json"),
        lambda: load("vit_b", ["optim.lr=0.5", "optim.lr_per_256=0.001"]),
        lambda: configuration.from_values(
            "vit_b", {"optim.lr": 0.5, "optim": {"lr_per_256": 0.001}}
        ),
    ):
        with pytest.raises(ConfigError, match=r"optim.lr = 0.5.*give one of the two keys"):
            make()
    with pytest.raises(ConfigError, match=r"optim.start_lr = 0.0001: above the learning rate of"):
        load("vit_b", ["optim.lr_per_256=1e-5"])


@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs"), [(100, 100), (99, 102), (1, 800), (13, 770), (5000, 20)]
)
def test_auto_epochs_make_ten_thousand_steps_within_bounds(steps_per_epoch, epochs):
    made = load("vit_b", ["run.epochs=auto"])
    assert made.run.epochs == "auto"
    assert configuration.with_epochs(made, steps_per_epoch).run.epochs == epochs
    given = load("vit_b")
    assert configuration.with_epochs(given, steps_per_epoch) is given


def test_a_warm_up_longer_than_the_automatic_epochs_is_refused():
    with pytest.raises(ConfigError, match=r"warmup_epochs = 40: longer than the 20 epochs"):
        configuration.with_epochs(load("vit_h", ["run.epochs=auto"]), 5000)
    for wrong in ('"many"', "0", "1.5"):
        with pytest.raises(ConfigError, match=r"^run.epochs = "):
            load("vit_b", [f"run.epochs={wrong}"])


def test_a_resumed_run_keeps_the_epochs_that_auto_became():
    saved = load("vit_b", ["run.epochs=77"]).model_dump(mode="json")
    asked = load("vit_b", ["run.epochs=auto"])
    assert configuration.keep_saved_values(asked, saved).run.epochs == 77


def test_the_table_of_rates_is_that_of_the_files():
    """docs/choosing_a_config.md, which once contradicted the files by a factor of 8."""
    text = (tiny.ROOT / "docs" / "choosing_a_config.md").read_text()
    rows = re.findall(r"\| `(\w+\.json)`[^|]*\| ([\d.]+) \| (\d+) \| ([\d.]+) \| ([\d,]+) \|", text)
    assert {name for name, *_ in rows} == {*SMALL, "vit_b.json", "vit_h.json"}
    images = {"vit_b.json": 1_281_167, "vit_h.json": 1_281_167, "imagenette128_vit_s.json": 9_469,
              "cifar10_vit_t.json": 50_000, "cifar10_vit_t_long.json": 50_000,
              "demo.json": 8_192}  # fmt: skip
    for name, lr, batch, per_256, steps in rows:
        made = load(name)
        assert (made.optim.lr, made.data.batch_size) == (float(lr), int(batch))
        assert float(per_256) == pytest.approx(made.optim.lr * 256 / made.data.batch_size)
        taken = made.run.epochs * (images[name] // made.data.batch_size)
        assert int(steps.replace(",", "")) == pytest.approx(taken, rel=0.01)
