"""`python -m cjepa_fast.export`: every form computes the same features, in its own library."""

import json
import shutil

import pytest
import tiny
import torch
from PIL import Image

from cjepa_fast import load_encoder
from cjepa_fast.checkpoint.encoders import crop_of, save_encoder
from cjepa_fast.export import __main__ as exporting
from cjepa_fast.export.formats import (
    FORMATS,
    Format,
    Source,
    is_installed,
    timm_config,
    write_timm,
)
from cjepa_fast.interop.vits import read_vit
from cjepa_fast.model.vit import MODELS, Encoder
from cjepa_fast.runtime.files import read_tensors

LONG = [pytest.param(form, marks=pytest.mark.long) for form in FORMATS if form != "hf"]
WIDE = {"width": 44, "heads": 4, "mlp_ratio": 48 / 11}  # a giant's MLP


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    encoder = tiny.uneven_encoder(**WIDE)
    with torch.no_grad():  # so small that the epsilon of the first norm shows
        encoder.pos_embed.mul_(1e-3)
        encoder.patch_embed.proj.weight.mul_(1e-3)
        encoder.patch_embed.proj.bias.mul_(1e-3)
    return tiny.write_run(tmp_path_factory.mktemp("trained"), encoder, eval={"crop": 0.75})


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """form -> (its folder, the difference that export found); each made once."""
    root, made = tmp_path_factory.mktemp("exports"), {}

    def export(form: str):
        for package in FORMATS[form].needs:
            pytest.importorskip(package)
        if form not in made:
            made[form] = root / form, exporting.export(run, form, root / form)
        return made[form]

    return export


@pytest.mark.parametrize("form", FORMATS)
def test_every_form_computes_the_same_features(exported, run, seed, form):
    pytest.importorskip(FORMATS[form].opened_by)
    folder, difference = exported(form)
    assert difference < 1e-5
    tokens = FORMATS[form].open(folder)
    for count in (1, 3):
        images = torch.randn(count, 3, 24, 24)
        with torch.no_grad():
            ours, theirs = load_encoder(run)(images), tokens(images)
        assert theirs.shape == (count, 36, 44)
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_s_code_runs(exported, monkeypatch, form):
    """In the export's folder, as the card says; it leaves tokens and features."""
    pytest.importorskip(FORMATS[form].opened_by)
    folder, _ = exported(form)
    code = (folder / "model_card.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    Image.new("RGB", (40, 30), (200, 10, 90)).save(folder / "image.jpg")
    names: dict = {}
    exec(compile(code, "model_card.md", "exec"), names)
    (folder / "image.jpg").unlink()
    assert tuple(names["tokens"].shape) == (1, 36, 44)
    features = torch.as_tensor(names["features"])
    assert torch.allclose(features, torch.as_tensor(names["tokens"]).mean(1), atol=1e-5)


@pytest.fixture(scope="module")
def oblong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oblong")
    encoder = tiny.uneven_encoder(image_size=(16, 32), depth=1)
    return tiny.write_run(folder, encoder, data={"image_size": [16, 32]}, eval={"crop": 0.75})


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "timm"])
def test_an_oblong_leaves_in_every_form(oblong, tmp_path, monkeypatch, form):
    """The card's code too, which shows the evaluation's window where a library cannot find it."""
    for package in (*FORMATS[form].needs, FORMATS[form].opened_by):
        pytest.importorskip(package)
    folder = tmp_path / form
    assert exporting.export(oblong, form, folder) < 1e-5
    card = (folder / "model_card.md").read_text()
    assert "16 x 32 pixels it gives 4 x 8 tokens" in card and "0.75 times as long and wide" in card
    monkeypatch.chdir(folder)
    picture = Image.new("RGB", (96, 64), (255, 0, 0))  # of whose window of 96 x 48 this is 0.75:
    picture.paste((51, 102, 153), (12, 14, 84, 50))
    picture.save("image.jpg", quality=100)
    names: dict = {}
    exec(compile(card.split("```python\n")[1].split("```")[0], "model_card.md", "exec"), names)
    assert tuple(names["tokens"].shape) == (1, 32, 24)
    if form == "hf":
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = names["images"]["pixel_values"] * std[:, None, None] + mean[:, None, None]
        far = (pixels - torch.tensor([0.2, 0.4, 0.6])[:, None, None]).abs()
        assert far[..., 1:-1, 1:-1].max() < 0.05 < far.max()  # the edge sees what is outside
        assert load_encoder(folder).image_size == (16, 32)


@pytest.fixture(scope="module", params=[1, 5])
def bands(request, tmp_path_factory):
    """Gray, which image processors read, and five bands, which they do not."""
    channels = request.param
    encoder = tiny.uneven_encoder(image_size=16, depth=1, channels=channels)
    data = {"image_size": 16, "channels": channels, "mean": [0.5] * channels}
    data["std"] = [0.25] * channels
    return tiny.write_run(tmp_path_factory.mktemp("bands"), encoder, data=data)


@pytest.mark.parametrize("form", ["hf", *(f for f in LONG if f.values[0] != "timm")])
def test_any_number_of_channels_leaves_in_every_form(bands, tmp_path, monkeypatch, form):
    for package in (*FORMATS[form].needs, FORMATS[form].opened_by):
        pytest.importorskip(package)
    ours, folder = load_encoder(bands), tmp_path / form
    assert exporting.export(bands, form, folder) < 1e-5
    card = (folder / "model_card.md").read_text()
    assert {1: "Images are gray,", 5: "Images are of 5 channels,"}[ours.channels] in card
    monkeypatch.chdir(folder)
    Image.new("L", (40, 30), 128).save("image.jpg", quality=100)
    names: dict = {}
    exec(compile(card.split("```python\n")[1].split("```")[0], "model_card.md", "exec"), names)
    assert tuple(names["tokens"].shape) == (1, 16, 24)
    if form in ("hf", "safetensors"):
        back = load_encoder(folder)
        assert (back.architecture, back.mean) == (ours.architecture, ours.mean)
    if form == "hf" and ours.channels == 1:
        pixels = names["images"]["pixel_values"]
        assert pixels.shape == (1, 1, 16, 16) and pixels.abs().max() < 0.02  # (128 / 255 - 0.5) / 4


@pytest.fixture(scope="module")
def by_tanh(tmp_path_factory):
    """A run whose model.gelu is "tanh", no two of its parameters alike."""
    torch.manual_seed(0)
    return tiny.write_run(tmp_path_factory.mktemp("tanh"), tiny.uneven_encoder(gelu="tanh"))


@pytest.mark.parametrize("form", ["hf", *LONG])
def test_tanh_s_gelu_leaves_in_every_form(by_tanh, tmp_path, seed, form):
    """Nearer to its own features than those of exact GELU are."""
    for package in FORMATS[form].needs:
        pytest.importorskip(package)
    ours, folder, images = load_encoder(by_tanh), tmp_path / form, torch.randn(2, 3, 24, 24)
    exact = tiny.with_gelu(ours, "exact")
    exporting.export(by_tanh, form, folder)
    if form in ("hf", "safetensors"):
        assert load_encoder(folder).architecture == ours.architecture
    if form == "timm":
        config = json.loads((folder / "config.json").read_text())
        assert config["model_args"]["act_layer"] == "gelu_tanh"
        tokens = read_vit(folder / "model.safetensors", 3)[0]
    else:
        pytest.importorskip(FORMATS[form].opened_by)
        tokens = FORMATS[form].open(folder)
    with torch.no_grad():
        wanted = ours(images)
        scale = wanted.abs().max()
        assert (tokens(images) - wanted).abs().max() < 1e-6 * scale
        assert (exact(images) - wanted).abs().max() > 1e-5 * scale


def test_timm_is_told_of_both_sides():
    encoder = tiny.uneven_encoder(image_size=(16, 32))
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    config = timm_config(Source(encoder, "target", 0.75))
    assert config["model_args"]["img_size"] == (16, 32) and config["model_args"]["in_chans"] == 3
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 32]


@pytest.mark.parametrize("form", ["hf", "safetensors"])
def test_what_is_loaded_back_is_the_same_to_the_bit(exported, run, form):
    ours, back = load_encoder(run), load_encoder(exported(form)[0])
    assert back.architecture == ours.architecture
    assert (back.mean, back.std) == (ours.mean, ours.std) and not back.training
    assert all(torch.equal(p, back.state_dict()[name]) for name, p in ours.state_dict().items())


def test_hugging_face_s_processor_shows_the_evaluation_s_images(exported):
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(exported("hf")[0])
    # grey, but for the border that the centre crop of 0.75 leaves out
    picture = Image.new("RGB", (80, 64), (255, 0, 0))
    picture.paste((51, 102, 153), (14, 6, 66, 58))
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 24, 24)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.tensor([0.2, 0.4, 0.6]) - mean) / std
    assert torch.allclose(pixels[0, :, 1:-1, 1:-1], expected[:, None, None], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves_loads(tmp_path, seed, dtype):
    """Not written by us: the names, the sizes given as pairs, and the dtype are theirs."""
    transformers = pytest.importorskip("transformers")
    config = transformers.IJepaConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        image_size=[24, 24], patch_size=4, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = transformers.IJepaModel(config).to(dtype).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        theirs = model.float()(images).last_hidden_state
        assert (load_encoder(tmp_path)(images) - theirs).abs().max() < 1e-5


def test_timm_s_names_shapes_and_arguments(exported):
    """Against timm's VisionTransformer without a class token, written down here."""
    folder, _ = exported("timm")
    weights = read_tensors(folder / "model.safetensors")
    block = {
        "norm1.weight": (44,), "norm1.bias": (44,),
        "attn.qkv.weight": (132, 44), "attn.qkv.bias": (132,),
        "attn.proj.weight": (44, 44), "attn.proj.bias": (44,),
        "norm2.weight": (44,), "norm2.bias": (44,),
        "mlp.fc1.weight": (192, 44), "mlp.fc1.bias": (192,),
        "mlp.fc2.weight": (44, 192), "mlp.fc2.bias": (44,),
    }  # fmt: skip
    expected = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    expected |= {"pos_embed": (1, 36, 44), "norm.weight": (44,), "norm.bias": (44,)}
    expected |= {"patch_embed.proj.weight": (44, 3, 4, 4), "patch_embed.proj.bias": (44,)}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["crop_pct"] == 0.75
    assert config["model_args"] == {
        "img_size": 24, "patch_size": 4, "in_chans": 3, "embed_dim": 44, "depth": 2, "num_heads": 4,
        "mlp_ratio": 48 / 11, "num_classes": 0, "class_token": False, "global_pool": "avg",
        "fc_norm": False,
    }  # fmt: skip


@pytest.mark.parametrize(("channels", "named"), [(3, True), (1, False), (5, False)])
def test_timm_is_asked_to_fit_no_filters_that_it_would_make_up(channels, named):
    """Of other channels than 3 its earlier versions keep random ones."""
    encoder = tiny.uneven_encoder(channels=channels)
    encoder.mean = encoder.std = (0.5,) * channels
    described = timm_config(Source(encoder, "target", 1.0))["pretrained_cfg"]
    assert ("first_conv" in described) == named


@pytest.mark.parametrize("form", ["hf", "safetensors"])
def test_the_crop_of_evaluation_goes_along(exported, run, form):
    folder, _ = exported(form)
    assert load_encoder(run).crop == load_encoder(folder).crop == 0.75
    assert crop_of(folder) == 0.75


@pytest.mark.parametrize("init", ["xavier", "ijepa"])
def test_timm_s_folder_tells_how_the_encoder_was_initialised(tmp_path, init):
    """Its untrained encoder is another network with the other one."""
    encoder = tiny.uneven_encoder(init=init)
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    write_timm(Source(encoder, "target", 1.0), tmp_path)
    back, _ = read_vit(tmp_path / "model.safetensors", encoder.heads)
    assert back.init == back.architecture["init"] == init


def test_timm_makes_our_width_of_the_mlp():
    """It rounds width * ratio down."""
    others = {
        f"{width}": {"width": width, "heads": 1, "mlp_ratio": 3.3} for width in range(4, 200, 4)
    }
    for sizes in {**MODELS, **others}.values():
        with torch.device("meta"):
            encoder = Encoder(24, 4, **{**sizes, "depth": 1})
        encoder.mean = encoder.std = (0.5, 0.5, 0.5)
        arguments = timm_config(Source(encoder, "target", 1.0))["model_args"]
        hidden = int(arguments["embed_dim"] * arguments["mlp_ratio"])
        assert hidden == encoder.blocks[0].mlp.fc1.out_features


def test_timm_loads_the_folder_by_name(exported):
    timm = pytest.importorskip("timm")
    if not hasattr(timm.models._hub, "load_model_config_from_path"):
        pytest.skip("this timm knows no local-dir:")
    folder, _ = exported("timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        ours = load_encoder(exported("safetensors")[0])(images).mean(1)
        assert torch.allclose(model(images), ours, atol=1e-5)


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_programs_tell_nothing_of_this_machine(exported, form):
    folder, _ = exported(form)
    for path in folder.iterdir():
        assert str(tiny.ROOT).encode() not in path.read_bytes(), path.name


def test_the_context_encoder(run, tmp_path):
    context = tiny.uneven_encoder(**WIDE)
    context.mean, context.std = load_encoder(run).mean, load_encoder(run).std
    other = shutil.copytree(run, tmp_path / "run")
    save_encoder(context, other / "context_encoder.safetensors")
    assert exporting.export(other, "safetensors", tmp_path / "out", "context") == 0
    back = load_encoder(tmp_path / "out", "context")
    assert torch.equal(back.norm.bias, context.norm.bias)
    with pytest.raises(FileNotFoundError):
        load_encoder(tmp_path / "out")  # it would be taken for the target's


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    command = [str(run), "--to", "safetensors", "--out", str(out)]
    assert exporting.main(command) == 0  # an empty one is taken
    assert "its features differ by 0 at most" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert exporting.main(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("failing", ["writer", "features"])
def test_a_failed_export_leaves_nothing(run, tmp_path, monkeypatch, failing):
    def write(source, folder):
        (folder / "half.bin").write_bytes(b"half")
        if failing == "writer":
            raise OSError("no space left")

    broken = Format(write, lambda folder: lambda images: torch.zeros(2, 36, 44), "torch")
    monkeypatch.setitem(FORMATS, "torch", broken)
    with pytest.raises((OSError, ValueError), match=r"no space left|differ from"):
        exporting.export(run, "torch", tmp_path / "a" / "out")
    assert not any((tmp_path / "a").iterdir())


def test_a_missing_package_is_named_with_the_extra(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cjepa_fast.export.formats.is_installed", lambda name: name != "onnxscript")
    assert exporting.main([str(run), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "--to onnx needs onnxscript" in said and "pip install '.[export]'" in said
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared_is_said(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "is_installed", lambda name: False)
    assert exporting.main([str(run), "--to", "timm", "--out", str(tmp_path / "out")]) == 0
    assert "not compared with the encoder, since timm is not installed" in capsys.readouterr().out


def test_installed_means_that_it_can_be_imported():
    assert is_installed("torch") and not is_installed("no_such_package")
