"""Configurations read from JSON, with "extends" and overrides, and from the folders of runs.

`load("vit_h.json", ["optim.lr=3e-4"])` finds the file, resolves its "extends", applies the
overrides and checks everything; whatever is wrong raises one ConfigError that names the key, the
value, what is allowed and, for an unknown key, the nearest valid one.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cjepa_fast.config.checks import find_problems
from cjepa_fast.config.resolve import refuse_both, with_rate, without_rival
from cjepa_fast.config.schema import Config, ConfigError, DataSection, Section
from cjepa_fast.runtime import json_text
from cjepa_fast.runtime.printable import printable

# pydantic's names of what data.path, data.image_size and run.epochs may be
FORMS = ("str", "tuple[str, ...]", "side", "height, width", "epochs-number", "word")
NOT_EXPANDED = re.compile(r"\$(?:\w+|\{\w+\})|^~[^/]*")  # of a path: what `expand_path` left
MOST_SHOWN = 160  # characters of a value in a message


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a file, with `key.path=value` overrides. Raises ConfigError."""
    given: dict = {}
    for override in overrides:
        _override(given, override)
    refuse_both(given)
    file = find(name)
    values = without_rival(_resolved(file), given)
    for override in overrides:
        _override(values, override)
    return validate(values, file.stem)


def from_values(source: str | Path | dict | Config, overrides: Mapping[str, Any]) -> Config:
    """The configuration of a file (as in `load`) or of values, with {"key.path": value} laid over
    it; a value may be a dict of keys below. Raises ConfigError."""
    if isinstance(source, Config):
        values, name = source.model_dump(mode="json", exclude_unset=True), "run"
        if source.optim.lr_per_256 is not None:
            values["optim"].pop("lr", None)  # it followed from the batch, which may be another now
    elif isinstance(source, dict):
        values, name = source, "run"
    else:
        file = find(str(source))
        values, name = _resolved(file), file.stem
    given: dict = {}
    for path, value in overrides.items():
        for key in reversed(path.split(".")):
            value = {key: value}
        given = _merged(given, value)
    refuse_both(given)
    return validate(_plain("", _merged(without_rival(values, given), given)), name)


def _plain(key: str, value: Any) -> Any:
    """A value as JSON has it: a path as text, a scalar of numpy's or torch's as a number. Raises
    ConfigError."""
    if isinstance(value, Mapping):
        return {str(k): _plain(f"{key}.{k}".lstrip("."), v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(key, one) for one in value]
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if getattr(value, "size", None) == 1 or getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ConfigError(
        f"{key} = {printable(repr(value)[:MOST_SHOWN])}: of type {type(value).__name__}; give a "
        "number, a text, true or false, or a list or dict of these"
    )


def validate(values: dict, name: str = "run") -> Config:
    """Check a dict of sections; `name` fills {config} in run.dir. Raises ConfigError."""
    try:
        config = Config.model_validate_json(json.dumps(values))
    except ValidationError as error:
        _refuse_other_bytes("", values)
        lines = dict.fromkeys(_explain(e) for e in error.errors())
        raise ConfigError("\n".join(lines)) from None
    except RecursionError:
        raise ConfigError("the configuration is nested too deeply") from None
    problems = list(find_problems(config))
    if problems:
        raise ConfigError("\n".join(problems))
    run = config.run.model_copy(update={"dir": config.run.dir.replace("{config}", name)})
    return with_rate(config.model_copy(update={"run": run}))


def _refuse_other_bytes(key: str, value: Any) -> None:
    """Raises ConfigError for a text that JSON cannot hold."""
    for below, one in value.items() if isinstance(value, dict) else ():
        _refuse_other_bytes(f"{key}.{below}".lstrip("."), one)
    for one in value if isinstance(value, (list, tuple)) else ():
        _refuse_other_bytes(key, one)
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(
            f"{key} = {printable(value)}: has bytes that are no UTF-8, which a run's config.json "
            "cannot hold; rename it, or name a link to it"
        )


def load_run(run: Path) -> Config:
    """The configuration a run was made with, from its folder. Raises ConfigError."""
    return validate(with_saved_defaults(_read(run / "config.json")))


def with_saved_defaults(saved: dict, section: type[Section] = Config) -> dict:
    """A saved configuration with the keys that came later, each at what the code did before."""
    values = dict(saved)
    for key, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            part = values.get(key, {})
            values[key] = with_saved_defaults(part, inner) if isinstance(part, dict) else part
        elif key not in values:
            values[key] = _was(field, field.get_default(call_default_factory=True))
    return values


def _was(field: FieldInfo, otherwise: Any) -> Any:
    extra = field.json_schema_extra
    return extra.get("was", otherwise) if isinstance(extra, dict) else otherwise


def keep_saved_values(config: Config, saved: dict) -> Config:
    """The configuration of a resumed run; `saved`: the one of its checkpoint, with its defaults.

    A key that the user has not set, and whose default is another than when the run began, keeps
    the value of then; and what "auto" became stays as it is.
    """
    values = _as_begun(config, saved)
    if config.run.precision == "auto":
        values["run"]["precision"] = saved["run"]["precision"]
    if config.run.epochs == "auto":
        values["run"]["epochs"] = saved["run"]["epochs"]
    return Config.model_validate_json(json.dumps(values))


def _as_begun(section: Section, saved: dict) -> dict:
    values = section.model_dump(mode="json")
    for key, field in type(section).model_fields.items():
        inner, before = getattr(section, key), saved.get(key)
        if isinstance(inner, Section):
            values[key] = _as_begun(inner, before or {})
        elif key not in section.model_fields_set and before == _was(field, values[key]):
            values[key] = before
    return values


def find(name: str) -> Path:
    """The file itself, or the one of that name (".json" may be left out) in configs/."""
    shipped = configs_folder()
    for path in (Path(name), Path(f"{name}.json"), shipped / name, shipped / f"{name}.json"):
        if _is_file(path):
            return path
    names = ", ".join(sorted(path.name for path in shipped.glob("*.json")))
    short = _shortened(name)
    raise ConfigError(f"--config {short}: no such file here or in configs/, which has {names}")


def _is_file(path: Path) -> bool:
    """Not one whose name no file can have, or in a folder that may not be looked into."""
    try:
        return path.is_file()
    except OSError:
        return False


def configs_folder() -> Path:
    """configs/ of the source tree, or of the installed package."""
    root = Path(__file__).resolve().parents[2]
    beside = root / "configs"
    own = (root / "setup.py").is_file()  # in site-packages a folder beside us is somebody else's
    return beside if own and beside.is_dir() else Path(str(resources.files("cjepa_fast.configs")))


def _resolved(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The file's values laid over those of the file it extends."""
    if path.resolve() in seen:
        raise ConfigError(f'{path}: "extends" goes in a circle')
    values = _read(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    beside = path.parent / str(parent)
    base = beside if _is_file(beside) else find(str(parent))
    return _merged(without_rival(_resolved(base, (*seen, path.resolve())), values), values)


def _read(path: Path) -> dict:
    """The sections of a file. Raises ConfigError for what is no JSON, and for a key that stands
    twice, of which JSON's readers take the last without a word."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json_text.parse(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a JSON object of sections")
    if twice := next(json_text.repeated_keys(text), None):
        raise ConfigError(
            f"{path}: {json.dumps(twice.key)} stands twice in one object, in lines "
            f"{twice.first_line} and {twice.line}: remove one"
        )
    return values


def _merged(base: dict, over: dict) -> dict:
    both = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            both[key] = _merged(base[key], over[key])
    return both


def _override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        value = json_text.parse(text)
    except ValueError:
        value = text  # a bare word is a string
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {section} is a value, it has no key below it")
    before = values.get(last)
    both = isinstance(before, dict) and isinstance(value, dict)
    values[last] = _merged(before, value) if both else value


def _section_at(path: Sequence) -> type[Section] | None:
    model: Any = Config
    for part in path:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field else None
    return model if hasattr(model, "model_fields") else None


def _explain(error: dict) -> str:
    """One line for one of pydantic's errors."""
    at, unknown = error["loc"], error["type"] == "extra_forbidden"
    end = len(at) - unknown  # the last one is then the user's key, which may be called as a form is
    path = [str(part) for i, part in enumerate(at) if i >= end or part not in FORMS]
    key, value = printable(".".join(path)), _shown(error["input"])
    if unknown:
        section = _section_at(path[:-1])
        valid = sorted(section.model_fields) if section else []
        near = difflib.get_close_matches(path[-1], valid, n=1, cutoff=0.0)
        nearest = ".".join([*path[:-1], near[0]]) if near else ""
        return f"{key} = {value}: no such key; nearest is {nearest}; valid: {', '.join(valid)}"
    reason = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "string_type" and isinstance(error["input"], (int, float)):
        reason += f"; as a text it stands in quotes: --set '{key}=\"{value}\"'"
    subject = f"{key} = {value}" if key else "the configuration"
    return f"{subject}: {reason}{_nearest_word(error)}"


def _shown(value: Any) -> str:
    """As JSON, and no longer than a line."""
    return _shortened(printable(json.dumps(value)))


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "..."


def _nearest_word(error: dict) -> str:
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    words = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
    near = difflib.get_close_matches(error["input"], words, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def expand_path(path: str) -> str:
    """A path with ~ and environment variables put in."""
    return os.path.expandvars(os.path.expanduser(path))


def check_paths_set(config: Config) -> None:
    """Raises ConfigError for a path in which a variable that is not set, or the home of a user who
    is not there, would become the name of a folder."""
    online = config.eval.online
    paths = [config.data.path] if isinstance(config.data.path, str) else config.data.path
    named = [("run.dir", config.run.dir), *(("data.path", path) for path in paths)]
    keys = ("data", "test", "labels", "test_labels")
    named += [(f"eval.online.{key}", getattr(online, key) or "") for key in keys]
    for key, path in named:
        check_path_set(key, path)


def check_path_set(key: str, path: str) -> None:
    """Check one path. A path that exists literally is accepted."""
    if path.strip() and not expand_path(path).strip():
        raise ConfigError(f"{key} = {json.dumps(path)}: is empty with its variables put in")
    left = NOT_EXPANDED.search(expand_path(path))
    if left and not os.path.lexists(expand_path(path)):
        what = "no such user" if left[0].startswith("~") else "this variable is not set"
        raise ConfigError(f"{key} = {json.dumps(path)}: {left[0]}: {what}")


def image_paths(data: DataSection) -> list[str]:
    """data.path, one or several, each `expand_path`."""
    paths = [data.path] if isinstance(data.path, str) else data.path
    return list(map(expand_path, paths))
