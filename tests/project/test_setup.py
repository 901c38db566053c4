"""Packaging: what is declared, pinned, shipped and promised by the Makefile and the README."""

import importlib.resources
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def setup_arguments() -> dict:
    """What setup.py passes to setup()."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("setuptools.setup", found.update)
        runpy.run_path("setup.py")
    return found


def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def project_name(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
    return re.sub(r"[-_.]+", "-", name).lower()


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def copy_of_the_tree(to: Path) -> Path:
    """The files that packaging reads, elsewhere: a build writes beside its sources."""
    for name in ("cjepa_fast", "kernels", "configs", "scripts"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
    ):
        shutil.copy(ROOT / name, to / name)
    return to


def test_every_dependency_is_pinned_exactly():
    arguments = setup_arguments()
    dev = arguments["extras_require"]["dev"]
    wanted = {project_name(r) for r in arguments["install_requires"] + dev}
    for line in constraint_lines():
        assert re.fullmatch(r'[a-z0-9-]+==[0-9.]+(; python_version (<|>=) "3.11")?', line), line
    assert wanted <= {project_name(line) for line in constraint_lines()}
    assert "apex" not in wanted  # the registry's apex is another project


def test_each_python_version_gets_one_pin_a_package():
    for marker in ("<", ">="):
        pinned = [
            project_name(line)
            for line in constraint_lines()
            if "python_version" not in line or f"python_version {marker} " in line
        ]
        assert len(pinned) == len(set(pinned))


def packaged_files(root: Path) -> set[str]:
    """Every module and configuration below cjepa_fast, kernels and configs, as it is installed."""
    ours = {"cjepa_fast": "", "kernels": "cjepa_fast/", "configs": "cjepa_fast/"}
    return {
        prefix + path.relative_to(root).as_posix()
        for top, prefix in ours.items()
        for path in (root / top).rglob("*")
        if path.suffix in {".py", ".json"}
    }


def test_every_folder_with_modules_is_a_package():
    """setup.py finds packages by their __init__.py."""
    for top in ("cjepa_fast", "kernels"):
        for path in (ROOT / top).rglob("*.py"):
            assert path.with_name("__init__.py").is_file(), path


@pytest.mark.parametrize(
    "system, machine", [("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64")]
)
def test_each_system_is_asked_only_for_what_it_can_have(system, machine):
    """Triton and DALI have no builds for macOS; what is left there is installed everywhere."""
    here = {"platform_system": system, "platform_machine": machine}
    wanted = [Requirement(text) for text in setup_arguments()["install_requires"]]
    names = {r.name for r in wanted if r.marker is None or r.marker.evaluate(here)}
    linux = {"triton", "deepspeed", "nvidia-dali-cuda130", "nvidia-ml-py"}
    assert names & linux == (linux if system == "Linux" else set())
    assert names - linux == {r.name for r in wanted} - linux


def test_version_is_written_once_the_same():
    import cjepa_fast

    assert setup_arguments()["version"] == cjepa_fast.__version__


def test_kernels_and_configs_are_found_as_subpackages():
    import cjepa_fast.kernels.gather

    assert cjepa_fast.kernels.gather.__name__ == "cjepa_fast.kernels.gather"
    shipped = {p.name for p in importlib.resources.files("cjepa_fast.configs").iterdir()}
    assert set(shipped_configs()) <= shipped


def pip_install(site: Path, *what: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    pip = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(site)]
    subprocess.run([*pip, *what], check=True, timeout=200)


def packages_seen_from(site: Path, cwd: Path) -> dict[str, str]:
    """Where a fresh interpreter finds the parts."""
    code = (
        "import json, importlib.resources, cjepa_fast, cjepa_fast.kernels.gather as g\n"
        "configs = importlib.resources.files('cjepa_fast.configs')\n"
        "print(json.dumps({'package': cjepa_fast.__file__, 'kernels': g.__file__,\n"
        "    'configs': sorted(p.name for p in configs.iterdir() if p.suffix == '.json')}))"
    )
    return json.loads(run_from(site, cwd, code).stdout)


def run_from(site: Path, cwd: Path, code: str) -> subprocess.CompletedProcess:
    """Code in a fresh interpreter, to which `site` comes before all installed packages."""
    # -S, or this environment's own editable install would come first.
    before = f"import site; [site.addsitedir(d) for d in {[str(site), *installed_folders()]!r}]\n"
    command = [sys.executable, "-S", "-c", before + code]
    return subprocess.run(command, cwd=cwd, check=True, text=True, stdout=subprocess.PIPE)


def installed_folders() -> list[str]:
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def shipped_configs() -> list[str]:
    return sorted(path.name for path in (ROOT / "configs").glob("*.json"))


@pytest.mark.long
@pytest.mark.slow
def test_the_wheel_works_away_from_its_source(tmp_path):
    """Kernels and configs arrive under cjepa_fast, and nothing else at the top level."""
    source, site = copy_of_the_tree(tmp_path / "src"), tmp_path / "site"
    for new in ("cjepa_fast/new", "cjepa_fast/new/deeper", "kernels/new"):  # nobody lists these
        (source / new).mkdir()
        (source / new / "__init__.py").touch()
    shipped = packaged_files(source)
    pip_install(site, str(source))
    shutil.rmtree(source)
    installed = {p.relative_to(site).as_posix() for p in (site / "cjepa_fast").rglob("*")}
    assert shipped <= installed and len(shipped) > 100
    top = {p.name for p in site.iterdir() if not p.name.endswith(".dist-info")}
    assert top <= {"cjepa_fast", "bin"}
    seen = packages_seen_from(site, tmp_path)
    assert Path(seen["package"]) == site / "cjepa_fast" / "__init__.py"
    assert Path(seen["kernels"]) == site / "cjepa_fast" / "kernels" / "gather" / "__init__.py"
    assert seen["configs"] == shipped_configs()
    a_first_day(site, tmp_path)


def a_first_day(site: Path, folder: Path) -> None:
    """Three steps of a training, its features in a file and evaluated, an export and a plan, as
    users of the wheel have them."""
    config = tiny.write_config(folder, run={"epochs": 1}, data={"batch_size": 12})
    run_from(
        site,
        folder,
        f"""
import cjepa_fast as cj
from cjepa_fast.eval.__main__ import main as evaluate
from cjepa_fast.export.__main__ import main as export
from cjepa_fast.tools.plan import main as plan
run = cj.pretrain({str(config)!r})
assert run.status == 0 and run.log()[-1]["step"] == 3
assert evaluate(["embed", str(run.folder), "images", "--out", "features.npz"]) == 0
assert evaluate(["all", str(run.folder), "--data", "images", "--count", "20"]) == 0
assert export([str(run.folder), "--to", "safetensors", "--out", "exported"]) == 0
assert plan(["--config", "vit_h", "--gpu", "h200"]) == 0
""",
    )
    assert np.load(folder / "features.npz")["features"].shape == (40, 24)
    assert (folder / "exported" / "encoder.safetensors").is_file()


@pytest.mark.long
@pytest.mark.slow
def test_an_editable_install_finds_what_lies_outside_the_package(tmp_path):
    source, site = copy_of_the_tree(tmp_path / "src"), tmp_path / "site"
    pip_install(site, "--editable", str(source))
    seen = packages_seen_from(site, tmp_path)
    assert Path(seen["package"]) == source / "cjepa_fast" / "__init__.py"
    assert Path(seen["kernels"]) == source / "kernels" / "gather" / "__init__.py"
    assert seen["configs"] == shipped_configs()


def run_make(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """make as from a user's shell, also where these tests are run by make itself."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFL"))
    }
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
def test_help_is_the_default_and_names_every_target():
    done = run_make(ROOT)
    listed = {line.split()[1] for line in done.stdout.splitlines()}
    assert listed == makefile_targets()


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_names_only_what_exists():
    text = readme()
    for module in set(re.findall(r"python -m (cjepa_fast[\w.]*)", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for script in set(re.findall(r"\b((?:cjepa_fast|bench)/[\w/]+\.(?:py|sh))", text)):
        assert (ROOT / script).is_file(), script
    for config in set(re.findall(r"--config (\w+)\.json", text)):
        assert (ROOT / "configs" / f"{config}.json").is_file(), config
    assert set(re.findall(r"^ *make (\w+)", text, flags=re.M)) <= makefile_targets()
    assert len(text.splitlines()) <= 120


def test_readme_settings_are_keys_of_the_configuration():
    """Each `--set section.key=` of the README is a field of that section."""
    from cjepa_fast.config import Config

    for section, key in set(re.findall(r"--set (\w+)\.(\w+)=", readme())):
        fields = Config.model_fields[section].annotation.model_fields
        assert key in fields, f"{section}.{key}"


def test_the_tree_lists_every_module():
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in [*(ROOT / "cjepa_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        if path.name not in ("__init__.py", "__main__.py"):
            assert path.name in tree, path.name


def test_every_promise_names_tests_that_are_there():
    """tests/promises.md: whole names, or their beginning before "..."."""
    text = (ROOT / "tests" / "promises.md").read_text()
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    there = set(re.findall(r"def (test_\w+)", "\n".join(sources.values())))
    named = re.findall(r"`(test_\w+?)(\.\.\.)?`", text)
    assert len(named) > 20
    for name, more in named:
        assert name in there if not more else any(test.startswith(name) for test in there), name
    for file in re.findall(r"\btest_\w+\.py\b", text):
        assert file in sources


def test_the_version_has_its_changes():
    version = setup_arguments()["version"]
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
