"""docs/config.md and --help-config: every key in words."""

import pytest
import tiny

from cjepa_fast import train
from cjepa_fast.config.describe import explained, keys, markdown
from cjepa_fast.config.schema import LossSection, SIGRegSection, VICRegSection


def test_the_page_is_what_the_schema_says():
    page = (tiny.ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == markdown(), "python -m cjepa_fast.config.describe > docs/config.md"


def test_every_key_says_what_it_is():
    found = list(keys())
    assert len(found) > 80 and not [key.path for key in found if not key.text]
    assert not [key for key in found if not key.values]


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("optim.betas", "(2 of: number, >= 0, < 1)"),
        ("model.width", "(integer, >= 1, <= 65536 or null)"),
        ("loss.vicreg.projector", "(any number of: integer, >= 1, <= 65536 or null)"),
        ("mask.sampler", '("uniform" or "ijepa")'),
        ("deepspeed", "(object)"),
    ],
)
def test_values_are_told_in_the_words_of_JSON(path, values):
    assert values in explained(path).splitlines()[0]


def test_the_command_explains_a_key_a_section_and_names_the_nearest(capsys):
    def ended(*args: str) -> int:
        with pytest.raises(SystemExit) as end:
            train.main(list(args))
        return end.value.code or 0

    assert ended("--help-config", "optim.clip") == 0
    clip = "optim.clip = 0.0   (number, >= 0, <= 1e+12)\n    largest "
    assert capsys.readouterr().out.startswith(clip)
    assert ended("--help-config", "loss") == 0
    said = capsys.readouterr().out.splitlines()[::2]
    fields = [*LossSection.model_fields.keys() - {"vicreg", "sigreg"}]
    fields += [*VICRegSection.model_fields, *SIGRegSection.model_fields]
    assert len(said) == len(fields) and all(line.startswith("loss.") for line in said)
    assert ended("--help-config", "optim.learning_rat") == 2
    assert "no such key; nearest is optim." in capsys.readouterr().err
    assert ended() == 2
    assert "required: --config" in capsys.readouterr().err
