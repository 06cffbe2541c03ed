"""Numbers, texts and names of settings that no run could use are refused where they are given."""

import json
from typing import get_type_hints

import numpy as np
import pytest

from radiance import config
from radiance.base.settings import MAX_FLOAT, MIN_FLOAT, Section
from radiance.flow.schedules import make_time_schedule


def settings_of(section: type, kinds: tuple, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings of some types."""
    names = []
    for name, kind in get_type_hints(section).items():
        if isinstance(kind, type) and issubclass(kind, Section):
            names += settings_of(kind, kinds, f"{prefix}{name}.")
        elif kind in kinds:
            names.append(prefix + name)
    return names


FLOATS = settings_of(config.Config, (float, float | None))
INTEGERS = settings_of(config.Config, (int,))
TEXTS = settings_of(config.Config, (str,))


def test_all_kinds_are_found():
    assert {"optimizer.learning_rate", "optimizer.clip_norm", "sample.shift"} <= set(FLOATS)
    assert {"train.steps", "data.shapes.seed", "distill.sample.steps"} <= set(INTEGERS)
    assert {"name", "data.path", "sample.negative_prompt"} <= set(TEXTS)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "1e39", "1e-60"])
@pytest.mark.parametrize("name", FLOATS)
def test_numbers_that_float32_cannot_hold_are_refused(name, value):
    with pytest.raises(config.ConfigError, match=name.split(".")[-1]):
        config.override(config.Config(), [f"{name}={value}"])


@pytest.mark.parametrize("name", ["guidance_interval=nan,1", "beta=inf,1", "guidance_scale=inf"])
def test_lists_of_numbers_are_checked_too(name):
    with pytest.raises(config.ConfigError, match="finite"):
        config.override(config.Config(), [f"sample.{name}"])


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [2**63, -(2**40), 10**400])
def test_integers_out_of_range_are_refused(name, value):
    tree = config.to_dict(config.Config())
    *sections, setting = name.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[setting] = value
    with pytest.raises(config.ConfigError, match=setting):
        config.from_dict(config.Config, tree)


@pytest.mark.parametrize("name", TEXTS)
def test_nul_characters_are_refused(name):
    with pytest.raises(config.ConfigError, match="NUL"):
        config.override(config.Config(), [f"{name}=a\0b"])


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/", "a\\b", "\n", "a\x1b[2J", "x" * 201, "é" * 101]
)
def test_names_that_are_no_folder_are_refused(name):
    with pytest.raises(config.ConfigError, match="name="):
        config.Config(name=name)


def test_usual_names_are_accepted():
    for name in ("run", "a b", "ünïcode", "v1.0", "..a", "lr=1e-3", "x" * 200):
        assert config.Config(name=name).run_dir.name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("eps=0", "eps=0.0 must be positive"),
        ("beta1=0.99999999", "rounded to float32"),
        ("beta2=1", "less than 1"),
        ("muon_beta=-0.1", "at least 0"),
        ("ema_decays=0.9999999999", "between 0 and"),
        ("weight_decay=20000", "must be less than 1"),
        ("clip_norm=0", "must be positive"),
        ("lr_multipliers=head=1e38,text=1", None),
        ("lr_multipliers=head=1e-40", "positive numbers"),
        ("lr_multipliers=head=nan", "positive numbers"),
        ("lr_multipliers=head=inf", "positive numbers"),
    ],
)
def test_the_optimizer_has_ranges(change, message):
    if message is None:
        config.override(config.Config(), [f"optimizer.{change}"])
        return
    with pytest.raises(config.ConfigError, match=message):
        config.override(config.Config(), [f"optimizer.{change}"])


def test_the_bounds_of_floats_are_those_of_float32():
    assert np.finfo(np.float32).max == MAX_FLOAT
    assert np.finfo(np.float32).tiny == MIN_FLOAT
    assert np.float32(config.optimizer.MAX_DECAY) < 1
    assert np.float32(config.optimizer.MAX_DECAY + 2**-25) == 1


def test_train_steps_fit_their_counter():
    with pytest.raises(config.ConfigError, match=r"train\.steps"):
        config.override(config.Config(), [f"train.steps={2**31}"])


def test_times_that_are_no_numbers_are_refused():
    with pytest.raises(config.ConfigError, match=r"sample\.schedule"), np.errstate(all="ignore"):
        make_time_schedule(config.Sample(schedule="shifted", shift=3e38), 16)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"model": ' * 5000, "\0", "{", "1" * 10_000, '"\\ud800"', "null"]
)
def test_configs_that_are_no_json_are_refused(text):
    with pytest.raises(config.ConfigError) as error:
        config.from_json(config.Config, text)
    assert len(str(error.value)) < 500


def test_large_wrong_values_are_cut_in_messages():
    for value in ("x" * 10_000, [1] * 10_000, {"a": "b" * 10_000}, 10**5000):
        with pytest.raises(config.ConfigError) as error:
            config.from_json(config.Config, json.dumps({"train": value}) if value != 10**5000
                             else '{"train": {"steps": ' + "9" * 4000 + "}}")  # fmt: skip
        assert len(str(error.value)) < 500
