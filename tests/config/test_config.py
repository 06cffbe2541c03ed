import ast
import dataclasses
import json
from pathlib import Path

import pytest

from radiance import config
from radiance.config import (
    Config,
    ConfigError,
    Model,
    differences,
    from_dict,
    from_json,
    override,
    to_dict,
    to_json,
)
from tests.helpers.toy_models import toy_model

SMALL = Config(model=config.MODELS["nano"])


def sentence(error):
    text = str(error.value)
    assert "\n" not in text, text
    assert text.endswith((".", "?")), text
    assert len(text) < 600, text
    return text


def check_rejected(match, *changes, start=SMALL):
    with pytest.raises(ConfigError, match=match) as error:
        override(start, changes)
    return sentence(error)


# --- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("train.steps=7", 7),
        ("optimizer.learning_rate=3e-4", 3e-4),
        ("optimizer.learning_rate=1", 1.0),
        ("model.guidance_embed=False", False),
        ("model.masking=strict", "strict"),
        ("name=a=b", "a=b"),
        ("optimizer.ema_decays=0.9,0.99", (0.9, 0.99)),
        ("optimizer.ema_decays=(0.9, 0.99)", (0.9, 0.99)),
        ("optimizer.ema_decays=[0.9]", (0.9,)),
        ("optimizer.ema_decays=", ()),
        ("optimizer.frozen=modulation,double/image", ("modulation", "double/image")),
        ("model.rope_axes=8,28,28", (8, 28, 28)),
        ("sample.beta=0.5,0.6", (0.5, 0.6)),
        ("sample.shift=1.15", 1.15),
        ("sample.shift=none", None),
        ("data.shapes.backgrounds=('navy', 'black')", ("navy", "black")),
        ("train.sample_prompts=", ()),
        ("train.sample_prompts=a sign that says 'no'", ("a sign that says 'no'",)),
        ("init=", ""),
    ],
)
def test_overrides_are_parsed_as_the_type_of_the_field(change, value):
    key = change.partition("=")[0]
    changed = override(SMALL, [change])
    for part in key.split("."):
        changed = getattr(changed, part)
    assert changed == value
    assert type(changed) is type(value)


def test_changes_are_checked_together():
    changes = ["model.hidden=96", "model.heads=3", "model.rope_axes=8,12,12"]
    for order in (changes, changes[::-1]):
        changed = override(SMALL, order)
        assert changed == dataclasses.replace(
            SMALL, model=dataclasses.replace(SMALL.model, hidden=96, heads=3, rope_axes=(8, 12, 12))
        )
        assert isinstance(changed, Config)
    check_rejected("rope_axes.*add up to 64, but a head has 48", "model.hidden=96", "model.heads=2")
    assert (
        override(SMALL, ["data.resolution=20", "model.patch=4"]).data.resolution == 20
    )  # two sections
    assert override(SMALL, []) == SMALL
    assert override(SMALL, ["train.steps=5", "train.steps=6"]).train.steps == 6
    assert override(toy_model(), ["hidden=96", "heads=4"]) == toy_model(
        hidden=96, heads=4
    )  # any section


def test_texts_with_commas_are_given_as_json():
    assert override(SMALL, ['train.sample_prompts=["red, blue", "[x]"]']).train.sample_prompts == (
        "red, blue",
        "[x]",
    )
    assert override(SMALL, ["train.sample_prompts=one,two"]).train.sample_prompts == ("one", "two")
    check_rejected("this list is not JSON", "train.sample_prompts=[one, two]")


def test_models_are_found_by_name():
    assert override(SMALL, ["model=small"]).model == config.MODELS["small"]
    assert override(SMALL, ["model=small", "model.registers=4"]).model == dataclasses.replace(
        config.MODELS["small"], registers=4
    )
    for name, model in config.MODELS.items():
        assert config.Model.from_name(name) is model
        assert model.head_dim * model.heads == model.hidden
    assert config.MODELS["chroma1-radiance"] == Model()
    assert Model().num_modulation_vectors == 344
    text = check_rejected(
        "no model named 'chroma1-radianc': did you mean 'chroma1-radiance'", "model=chroma1-radianc"
    )
    assert all(name in text for name in config.MODELS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("train.stepz=3", "'train.stepz': did you mean 'steps'"),
        ("trian.steps=3", "'trian.steps': did you mean 'train'"),
        ("model.qqqqqq=3", "Unknown key 'model.qqqqqq'. Model has channels, "),
        ("steps=3", "Unknown key 'steps'"),
        ("train.steps", "not of the form key=value"),
        (
            "train=3",
            "train=3 does not say which setting: write train.KEY=value, such as train.steps=",
        ),
        ("train.steps.more=3", "'steps' is a value, not a section"),
        ("train.steps=many", "train.steps='many': a whole number"),
        ("train.steps=1.5", "train.steps='1.5': a whole number"),
        ("train.steps=none", "whole number"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate='fast': a number"),
        ("optimizer.ema_decays=0.9,x", "optimizer.ema_decays='x': a number"),
        ("model.guidance_embed=yes", "model.guidance_embed='yes': bool is expected"),
        ("model.masking=one_pda", "model.masking='one_pda': did you mean 'one_pad'.*strict, off"),
        (
            "model.masking=zzz",
            "model.masking='zzz' is not known; the choices are one_pad, strict, off",
        ),
        ("sample.beta=0.4", "sample.beta=.*2 values are expected"),
        ("model.rope_axes=8,28", "three even numbers"),
    ],
)
def test_wrong_changes_are_rejected_with_a_suggestion(change, match):
    check_rejected(match, *change.split(" "))


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (config.Train, "steps", 1.0),
        (config.Train, "steps", True),
        (config.Train, "steps", "3"),
        (config.Train, "steps", None),
        (config.Config, "init", 3),
        (config.Train, "sample_prompts", "a dog"),
        (config.Train, "sample_prompts", [3]),
        (config.Optimizer, "learning_rate", "1e-4"),
        (config.Optimizer, "learning_rate", True),
        (config.Optimizer, "ema_decays", 0.9),
        (config.Flow, "logit_mean", "none"),
        (config.Sample, "guidance_interval", (0.0, 0.5, 1.0)),
        (config.Model, "guidance_embed", 1),
        (config.Model, "masking", 1),
        (Config, "model", "nano"),
        (Config, "train", {"steps": 3}),
    ],
)
def test_types_are_checked(section, key, value):
    with pytest.raises(ConfigError, match=rf"{section.__name__.lower()}\.{key}=|{key}=") as error:
        section(**{key: value})
    sentence(error)


def test_whole_numbers_and_lists_are_converted():
    optimizer = config.Optimizer(learning_rate=1, ema_decays=[0.5, 0.9])
    assert optimizer.learning_rate == 1.0
    assert type(optimizer.learning_rate) is float
    assert optimizer.ema_decays == (0.5, 0.9)
    assert hash(optimizer) == hash(config.Optimizer(learning_rate=1.0, ema_decays=(0.5, 0.9)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        optimizer.eps = 1.0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(hidden=50), "hidden=50.*heads=2|rope_axes"),
        (dict(hidden=49), "model.hidden=49 does not divide into model.heads=2"),
        (dict(heads=4), "add up to 24, but a head has 12"),
        (dict(rope_axes=(4, 10, 8)), "add up to 22, but a head has 24"),
        (dict(rope_axes=(5, 9, 10)), "three even numbers"),
        (dict(rope_axes=(-4, 14, 14)), "three even numbers"),
        (dict(mlp_ratio=2.51), "mlp_ratio=2.51 times model.hidden=48"),
        (dict(approximator_dim=12), "multiple of 8"),
        (dict(patch=5, patch_embed="conv_half"), "even model.patch, not 5"),
        (dict(patch=1), "use model.head=linear"),
        (dict(patch=1, head="linear", patch_embed="bottleneck"), "use model.patch_embed=conv"),
        (dict(bottleneck=0), "model.bottleneck=0 must be at least 1"),
        (dict(text_refiner_blocks=-1), "model.text_refiner_blocks=-1 must be at least 0"),
        (dict(padding="learned", masking="strict"), "model.masking=strict hides them"),
        (dict(pooled_dim=8), "pooled_dim=8.*not approximator"),
        (dict(pooled_dim=8, modulation="none"), "pooled_dim=8.*not none"),
        (dict(guidance_embed=True), "guidance_embed"),
        (dict(double_blocks=0, single_blocks=0), "at least one block"),
        (dict(single_blocks=-1), "model.single_blocks=-1 must be at least 0"),
        (dict(nerf_depth=0), "model.nerf_depth=0 must be at least 1"),
        (dict(hidden=0), "model.hidden=0 must be at least 1"),
    ],
)
def test_impossible_models_are_rejected(changes, match):
    with pytest.raises(ConfigError, match=match) as error:
        toy_model(**changes)
    sentence(error)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("data.resolution=100", "data.resolution=100 is not a multiple of model.patch=16"),
        ("data.background=0,0,256", "three numbers from 0 to 255"),
        ("data.flip_probability=2", "data.flip_probability=2.0 must be between 0 and 1"),
        ("data.dropped_caption=masked", "model.padding=encoder has no embedding for that"),
        (
            "data.shapes.max_objects=0",
            "data.shapes.max_objects=0 must be a whole number from 1 to 5",
        ),
        ("data.shapes.max_objects=6", "data.shapes.max_objects=6 must"),
        ("data.tag_dropout=1.5", "data.tag_dropout=1.5 must be between 0 and 1"),
        ("data.max_broken_fraction=-1", "data.max_broken_fraction=-1.0 must be between 0 and 1"),
        (
            "optimizer.gradient_accumulation_steps=3",
            "data.batch_size=256 does not divide into optimizer.gradient_accumulation_steps=3",
        ),
        ("name=a/b", "name of one folder"),
        ("name=", "name of one folder"),
        ("data.caption_dropout=1.5", "between 0 and 1"),
        ("compute.head_chunk_size=-1", "head_chunk_size=-1"),
        ("text.max_length=1", "text.max_length=1"),
        ("flow.min_divisor=0", "flow.min_divisor=0.0 must be positive"),
        ("flow.logit_mean=1", "no meaning for flow.timestep_distribution=parabola"),
        (
            "flow.timestep_distribution=logit_normal flow.timestep_weighting=uniform",
            "density of flow.timestep_distribution=logit_normal",
        ),
        (
            "flow.coupling=within_caption flow.coupling_caption_weight=1",
            "no meaning for flow.coupling=within_caption",
        ),
        ("flow.coupling_group_size=4", "no meaning for flow.coupling=independent"),
        (
            "flow.coupling=optimal_transport flow.coupling_group_size=7",
            "does not divide into groups",
        ),
        ("optimizer.learning_rate=nan", "must be a finite number"),
        ("optimizer.ema_decays=0.9,0.9", "twice"),
        ("optimizer.beta1=1", r"beta1=1.0"),
        ("train.seed=-1", "train.seed=-1"),
        ("train.max_to_keep=0", "train.max_to_keep=0"),
        ("train.profile_steps=-1", "train.profile_steps=-1 must be at least 0"),
        ("sample.unguided_steps=-1", "sample.unguided_steps=-1 must be at least 0"),
        ("data.shapes.named_backgrounds=1.5", "named_backgrounds=1.5"),
        ("sample.guidance_interval=0.8,0.2", "two increasing times"),
        ("sample.min_divisor=1", "sample.min_divisor=1.0 must be at least 0 and less"),
        ("sample.unconditional=masked", "model.padding=encoder has no embedding for that"),
        ("sample.weights=emma", "params, ema, ema=DECAY or width=WIDTH"),
        ("mesh.fsdp=-1", "one of them may be -1"),
        ("mesh.tensor=0", "at least 1"),
    ],
)
def test_contradicting_settings_are_rejected(change, match):
    check_rejected(match, *change.split(" "))


@pytest.mark.parametrize(
    "changes",
    [dict(mlp_ratio=0.0), dict(mlp_ratio=-1.0), dict(rope_theta=0.0), dict(rope_theta=-1.0)],
)
def test_ratios_must_be_positive(changes):
    with pytest.raises(ConfigError):
        toy_model(**changes)


# --- JSON ----------------------------------------------------------------------------------------


def test_json_round_trip():
    changed = override(
        SMALL,
        [
            "sample.shift=1.5",
            "optimizer.ema_decays=0.9,0.99",
            "train.sample_prompts=a dog,a cat",
            "flow.noise_scale=2",
        ],
    )
    for value in (SMALL, changed, Config(), *config.MODELS.values()):
        text = to_json(value)
        assert from_json(type(value), text) == value
        assert from_dict(type(value), to_dict(value)) == value
        assert hash(from_json(type(value), text)) == hash(value)
        assert to_json(from_json(type(value), text)) == text
    tree = json.loads(to_json(changed))
    assert tree["optimizer"]["ema_decays"] == [0.9, 0.99]
    assert tree["sample"]["shift"] == 1.5
    assert tree["flow"]["logit_mean"] is None


def test_json_with_missing_or_unknown_keys():
    assert from_json(Config, '{"train": {"steps": 5}}') == Config(train=config.Train(steps=5))
    for text, match in (
        ('{"train": {"stepz": 5}}', "did you mean 'steps'"),
        ("{", "not JSON"),
        ('{"train": {"steps": "5"}}', "train.steps='5'"),
    ):
        with pytest.raises(ConfigError, match=match) as error:
            from_json(Config, text)
        sentence(error)


@pytest.mark.parametrize("text", ["[1]", "3", '{"train": 3}', '{"train": null}'])
def test_json_of_another_form_is_rejected(text):
    with pytest.raises(ConfigError):
        from_json(Config, text)


def test_differences_list_dotted_keys():
    assert differences(SMALL, SMALL) == {}
    changed = override(
        SMALL, ["name=b", "model.registers=4", "sample.shift=1", "optimizer.ema_decays=0.5"]
    )
    assert differences(SMALL, changed) == {
        "name": ("run", "b"),
        "model.registers": (0, 4),
        "sample.shift": (None, 1.0),
        "optimizer.ema_decays": ((0.9999,), (0.5,)),
    }
    assert differences(SMALL.model, changed.model) == {"registers": (0, 4)}
    assert (
        override(
            SMALL,
            [
                f"{k}={v[1] if not isinstance(v[1], tuple) else v[1][0]}"
                for k, v in differences(SMALL, changed).items()
            ],
        )
        == changed
    )


def test_run_dir_expands_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(Config(name="a", output="~/runs").run_dir) == "/home/someone/runs/a"


def test_captions_that_a_cache_cannot_hold_are_rejected():
    changes = ["text.encoder=t5", "text.cache=there", "data.lowercase_probability=0.25"]
    with pytest.raises(
        config.ConfigError,
        match=r"data.lowercase_probability=0.25 makes captions that text.cache=there cannot hold",
    ):
        config.override(config.Config(), changes)
    config.override(config.Config(), [*changes, "text.file=t5.safetensors"])


# --- resumption ----------------------------------------------------------------------------------


def test_only_marked_settings_may_change_on_resumption():
    keys = config.resumable_settings(Config)
    assert {"train.steps", "name", "output", "data.path", "data.num_workers", "text.cache"} <= keys
    assert {"sample.steps", "compute.dtype", "mesh.fsdp"} <= keys  # complete sections
    frozen = {"model.hidden", "train.seed", "data.batch_size", "optimizer.learning_rate"}
    assert not keys & (frozen | {"distill.sample.steps", "data.shapes.seed"})


# --- documentation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted(Path(config.__file__).parent.glob("*.py")), ids=lambda x: x.stem
)
def test_every_setting_is_documented(path):
    for section in ast.parse(path.read_text()).body:
        if not isinstance(section, ast.ClassDef) or "Section" not in [
            ast.unparse(base) for base in section.bases
        ]:
            continue
        for node, following in zip(section.body, [*section.body[1:], None]):
            if isinstance(node, ast.AnnAssign):
                is_documented = isinstance(following, ast.Expr) and isinstance(
                    following.value, ast.Constant
                )
                assert is_documented, f"{section.name}.{ast.unparse(node.target)}"
