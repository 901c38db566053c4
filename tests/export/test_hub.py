"""`cjepa-export --push`, with a stand-in for huggingface_hub: no test needs a network."""

import sys
import types
from pathlib import Path

import pytest
import tiny

from cjepa_fast.export.__main__ import main
from cjepa_fast.export.hub import check


class Hub(types.ModuleType):
    """What the package does for us; `models` is what the service keeps."""

    def __init__(self, token: str | None = "hf_x", fault: Exception | None = None):
        super().__init__("huggingface_hub")
        self.models, self.private, self.commits = {}, {}, []
        self.get_token = lambda: token
        self.HfApi = lambda: types.SimpleNamespace(
            create_repo=self.create, file_exists=self.exists, create_commit=self.commit
        )
        self.CommitOperationAdd = types.SimpleNamespace
        self.fault = fault

    def create(self, name, repo_type, private, exist_ok):
        assert repo_type == "model" and exist_ok
        if name not in self.models:
            self.models[name], self.private[name] = {}, private

    def exists(self, name, file):
        return file in self.models[name]

    def commit(self, name, operations, commit_message):
        if self.fault:
            raise self.fault
        self.commits.append((name, commit_message))
        for one in operations:
            self.models[name][one.path_in_repo] = Path(one.path_or_fileobj).read_bytes()
        return types.SimpleNamespace(commit_url=f"https://hub.test/{name}/commit/1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.write_run(tmp_path_factory.mktemp("trained"), tiny.uneven_encoder())


def export(run, out, *more) -> int:
    return main([str(run), "--to", "safetensors", "--out", str(out), *more])


def test_the_whole_export_is_one_commit_and_its_card_the_readme(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := Hub())
    assert export(run, tmp_path / "a", "--push", "me/vit") == 0
    found, written = hub.models["me/vit"], {p.name for p in (tmp_path / "a").iterdir()}
    assert set(found) == written - {"model_card.md"} | {"README.md"}
    assert found["README.md"] == (tmp_path / "a" / "model_card.md").read_bytes()
    weights = next(name for name in found if name.endswith(".safetensors"))
    assert found[weights] == (tmp_path / "a" / weights).read_bytes()
    assert len(hub.commits) == 1 and hub.private == {"me/vit": True}
    assert "pushed: https://hub.test/me/vit/commit/1" in capsys.readouterr().out


def test_a_readme_that_is_there_stays(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := Hub())
    hub.models["me/vit"] = {"README.md": b"edited"}
    assert export(run, tmp_path / "a", "--push", "me/vit", "--public") == 0
    assert hub.models["me/vit"]["README.md"] == b"edited"
    assert "model_card.md" in hub.models["me/vit"] and not hub.private


def test_a_new_model_is_public_where_that_is_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := Hub())
    assert export(run, tmp_path / "a", "--push", "me/vit", "--public") == 0
    assert hub.private == {"me/vit": False}


@pytest.mark.parametrize(
    ("hub", "name", "said"),
    [
        (None, "me/vit", "needs huggingface_hub: pip install '.[hub]'"),
        (Hub(token=None), "me/vit", "no token of the hub is known here: set HF_TOKEN"),
        (Hub(), "vit", "--push vit: write it as USER/NAME"),
        (Hub(), "a/b/c", "--push a/b/c: write it as USER/NAME"),
    ],
)
def test_what_is_missing_is_one_error_before_anything_is_exported(
    hub, name, said, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert export(run, tmp_path / "a", "--push", name) == 2
    shown = capsys.readouterr()
    assert said in shown.err and len(shown.err.splitlines()) == 1 and not shown.out
    assert not (tmp_path / "a").exists()


def test_a_push_that_fails_leaves_the_export_and_says_how_to_send_it(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(fault=ConnectionError("no route")))
    assert export(run, tmp_path / "a", "--push", "me/vit") == 2
    said = capsys.readouterr().err
    assert "ConnectionError: no route" in said and f"hf upload me/vit {tmp_path / 'a'}" in said
    assert (tmp_path / "a" / "model_card.md").is_file()


def test_the_package_has_what_is_called_of_it():
    hub = pytest.importorskip("huggingface_hub")
    assert callable(hub.get_token) and callable(hub.CommitOperationAdd)
    for method in ("create_repo", "file_exists", "create_commit"):
        assert callable(getattr(hub.HfApi, method))


def test_public_without_push_is_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export(run, tmp_path / "a", "--public")
    assert "--public is for --push" in capsys.readouterr().err


def test_a_name_with_dots_and_dashes_is_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub())
    check("my-org/vit_s.v2")
