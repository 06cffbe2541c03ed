"""The reference of settings has every setting, and its defaults and limits are true."""

import dataclasses
import re
import subprocess
import sys

import pytest

from radiance.base.settings import Section, resumable_settings
from radiance.cli import main
from radiance.config import Config, ConfigError, MixtureSource, override, to_dict
from radiance.config.reference import (
    describe_sections,
    find_sections,
    format_value,
    read_field_docstrings,
)

SETTINGS = {x.key: x for section in find_sections() for x in section.settings}
# Their limits depend on other settings or the meaning states them: values are tried one by one.
LIMITS = {
    "optimizer.learning_rate": "number > 0",
    "optimizer.beta1": "number ≥ 0 and < 1",
    "optimizer.weight_decay": "number ≥ 0",
    "data.validation_fraction": "number ≥ 0 and < 1",
    "data.caption_dropout": "number from 0 to 1",
    "data.max_aspect_ratio": "number > 1",
    "data.bucket_step": "whole number ≥ 0",
    "data.shapes.max_objects": "whole number from 1 to 5",
    "text.max_length": "whole number ≥ 2",
    "sample.steps": "whole number from 1 to 10000",
    "train.steps": "whole number from 1 to 2147483647",
    "lora.alpha": "none or number > 0",
    "flow.logit_mean": "none or number",
    "model.patch": "whole number",
    "model.masking": "one_pad, strict, off",
    "mesh.fsdp": "whole number",
    "optimizer.ema_decays": "list of numbers",
    "data.background": "3 whole numbers",
    "train.loggers": "list of tensorboard, wandb",
    "data.shuffle_tags": "true, false",
    "data.mixture": "list of JSON objects",
}


def list_keys(section: Section, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        is_section = isinstance(value, Section)
        keys += list_keys(value, f"{prefix}{field.name}.") if is_section else [prefix + field.name]
    return keys


def test_every_setting_is_described_once():
    items = [f"data.mixture.{f.name}" for f in dataclasses.fields(MixtureSource)]
    items.remove("data.mixture.shapes")
    assert sorted(SETTINGS) == sorted(list_keys(Config()) + items)
    assert len(SETTINGS) == sum(len(section.settings) for section in find_sections())
    assert all(len(x.meaning) > 5 and x.values for x in SETTINGS.values())
    assert all(section.meaning for section in find_sections())


@pytest.mark.parametrize("key", [x for x in SETTINGS if not x.startswith("data.mixture")])
def test_defaults_are_those_of_the_command_line(key):
    default = SETTINGS[key].default
    assert override(Config(), [f"{key}={default}"]) == Config()


@pytest.mark.parametrize("key", LIMITS)
def test_limits(key):
    assert SETTINGS[key].values == LIMITS[key]


@pytest.mark.parametrize(
    "key", [key for key, x in SETTINGS.items() if re.search(r" (≥|>|from) ", x.values)]
)
def test_values_outside_the_limits_are_rejected(key):
    """With the defaults of all other settings, and the limits as the reference prints them."""
    values = SETTINGS[key].values
    step = 1 if "whole number" in values else 1e-3
    low = float(re.search(r"(?:≥|>|from) ([\d.]+)", values)[1])
    high = re.search(r"(?:≤|<|to) ([\d.]+)", values)
    outside = [low - step, *([float(high[1]) + step] if high else [])]
    outside += [low] if ">" in values else []
    for value in outside:
        text = int(value) if step == 1 else value
        section, _, name = key.rpartition(".")
        reference = Config()
        changes = [f"{key}={text}"]
        if section == "data.mixture":
            changes = ["data.source=mixture", f'data.mixture=[{{"path": "x", "{name}": {text}}}]']
        with pytest.raises(ConfigError):
            override(reference, changes)


def test_settings_that_may_change_are_marked():
    assert {key for key, x in SETTINGS.items() if x.is_resumable} == resumable_settings(Config)


def test_meanings_are_the_docstrings_under_the_fields():
    assert SETTINGS["train.log_every"].meaning == "Steps between entries of the log."
    assert set(read_field_docstrings(Config)) == set(to_dict(Config()))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), (True, "true"), (1e-4, "0.0001"), (0.123456789, "0.123456789"), ((), ""),
     ((1, 2), "1, 2"), ("a", "a"), (10_000.0, "10000")],
)  # fmt: skip
def test_values_as_text(value, text):
    assert format_value(value) == text


def test_one_section_or_setting_is_found():
    assert [x.name for x in find_sections("data.shapes")] == ["data.shapes"]
    (section,) = find_sections("train.steps")
    assert [x.key for x in section.settings] == ["train.steps"]
    with pytest.raises(ConfigError, match="did you mean 'optimizer'"):
        find_sections("optimizers")
    with pytest.raises(ConfigError, match=r"did you mean 'train\.steps'"):
        find_sections("train.step")


def test_the_tables_of_the_command_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    assert all(any(line.startswith(f"{name}: ") for line in lines) for name in describe_sections())
    first_words = [line.split()[0].rstrip("*") for line in lines if line[:1].strip()]
    assert set(SETTINGS) <= set(first_words)

    assert main(["config", "train.steps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: Length of the run")
    assert lines[2].split() == ["setting", "values", "default", "meaning"]
    assert lines[3].startswith("train.steps*  whole number from 1 to")

    assert main(["config", "model"]) == 0
    assert "model=NAME sets all at once: chroma1-radiance, " in capsys.readouterr().out
    assert main(["config", "models"]) == 2
    assert "did you mean 'model'" in capsys.readouterr().err


def test_settings_are_printed_without_jax():
    script = """
import sys
from radiance.cli import main
main(['config', 'model'])
print('jax' in sys.modules)
"""
    output = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert output.splitlines()[-1] == "False"
