"""Load checkpoints, text encoders and autoencoders, in Python and on the command line."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import radiance
from radiance import config
from radiance.base.errors import CheckpointError
from radiance.base.images import to_image
from radiance.cli import main
from radiance.data.datasets import open_source
from radiance.flow.sampler import generate_images
from radiance.loading import make_prompts_writer
from radiance.model import autoencoder
from radiance.text.factory import make_encoder
from radiance.text.prompts import encode_prompts
from radiance.training import validation
from radiance.training.checkpoints import Checkpoints
from radiance.training.run_directory import RunDirectory
from radiance.training.step import init_state
from radiance.weights import autoencoder as autoencoder_files
from radiance.weights import checkpoint, lora
from radiance.weights.convert import convert_checkpoint
from tests.helpers.toy_models import toy_model, toy_params
from tests.helpers.toy_runs import PLAIN, toy_run, train
from tests.helpers.toy_t5 import TOY, toy_folder

pytestmark = pytest.mark.slow

SIZES = dict(hidden=64, heads=2, rope_axes=(4, 14, 14), text_dim=TOY.hidden)
MODEL = toy_model(prediction="x0", **SIZES)
LATENT = toy_model(patch=1, head="linear", channels=16, **SIZES)
SMALL = autoencoder.Autoencoder(latent_channels=4, width=8, multipliers=(1, 2), blocks=1, groups=4)
QUICK = ["steps=2", "guidance_scale=2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of a pixel model, a latent model with its autoencoder, and T5 with its tokenizer."""
    folder = tmp_path_factory.mktemp("files")
    for name, model in (("pixels", MODEL), ("latents", LATENT)):
        checkpoint.write_checkpoint(
            folder / f"{name}.safetensors", model, toy_params(model), "bfloat16"
        )
    params = autoencoder.init_autoencoder_params(SMALL, jax.random.key(0))
    autoencoder_files.write_autoencoder(folder / "ae.safetensors", SMALL, params)
    toy_folder(folder / "t5")
    return folder


def sample(files, name, out, *more):
    code = main(
        [
            "sample",
            str(files / name),
            *QUICK,
            "--prompt",
            "a red cat",
            "--text-encoder",
            str(files / "t5"),
            "--out",
            str(out),
            *more,
        ]
    )
    assert code == 0
    return Image.open(next(out.glob("*_seed*.png")))


def pixels(image):
    return np.asarray(image, int)


def test_a_radiance_t5_and_tokenizer_from_files_to_a_png_in_one_command(files, tmp_path):
    image = sample(
        files, "pixels.safetensors", tmp_path / "out", "--size", "24x16", "--preset", "radiance-x0"
    )
    assert image.size == (24, 16)
    assert image.text["prompt"] == "a red cat"
    settings = json.loads(image.text["settings"])
    assert settings["steps"] == 2
    assert settings["schedule"] == "beta"
    other = sample(
        files,
        "pixels.safetensors",
        tmp_path / "other",
        "--size",
        "24x16",
        "--preset",
        "radiance-x0",
        "--seeds",
        "1",
    )
    assert np.abs(pixels(image) - pixels(other)).max() > 5


def test_a_latent_model_through_the_autoencoder(files, tmp_path):
    image = sample(
        files,
        "latents.safetensors",
        tmp_path / "out",
        "--size",
        "24x16",
        "--autoencoder",
        str(files / "ae.safetensors"),
    )
    assert image.size == (24, 16)
    cropped = sample(
        files,
        "latents.safetensors",
        tmp_path / "crop",
        "--size",
        "22x15",
        "--autoencoder",
        str(files / "ae.safetensors"),
    )
    assert np.array_equal(pixels(cropped), pixels(image)[:15, :22])


def test_sampled_latents_are_decoded(files):
    """The pipeline against its parts, put together by hand."""
    named = dict(
        text_encoder=str(files / "t5"),
        autoencoder=str(files / "ae.safetensors"),
        changes=["steps=2", "guidance_scale=1"],
        dtype="float32",
    )
    pipeline = radiance.load(files / "latents.safetensors", **named)
    image = pipeline(["a red cat"], seeds=[3], width=24, height=16)[0]
    condition, _ = encode_prompts(pipeline.encoder, ["a red cat"], pipeline.run.sample, "one_pad")
    latents = generate_images(
        pipeline.params,
        np.array([3], np.uint32),
        condition,
        None,
        model=LATENT,
        compute=pipeline.run.compute,
        settings=pipeline.run.sample,
        noise_scale=1.0,
        height=4,
        width=6,
    )
    decoded = autoencoder.decode_latents(
        SMALL,
        autoencoder_files.read_autoencoder(files / "ae.safetensors")[1],
        latents,
        dtype="float32",
    )
    assert np.abs(pixels(to_image(np.asarray(decoded[0]))) - pixels(image.image)).max() <= 1


@pytest.mark.parametrize(
    "name", ["model.gguf", "q8.gguf", "expanded.gguf", "int8", "float8_e4m3fn"]
)
def test_other_formats_and_storage_give_nearly_the_same_image(files, tmp_path, name):
    named = dict(
        text_encoder=str(files / "t5"), changes=["steps=2", "guidance_scale=1"], dtype="float32"
    )
    exact = radiance.load(files / "pixels.safetensors", **named)
    reference = pixels(exact(["a red cat"], seeds=[0], width=16, height=16)[0].image)
    path = files / "pixels.safetensors"
    if name.endswith(".gguf"):
        path = tmp_path / name
        convert_checkpoint(
            checkpoint.open_checkpoint(files / "pixels.safetensors"),
            path,
            "gguf",
            None if name == "model.gguf" else "q8_0",
        )
        named |= {"weight_format": "none"} if name == "expanded.gguf" else {}
    else:
        named["weight_format"] = name
    pipeline = radiance.load(path, **named)
    kinds = {
        type(leaf).__name__
        for leaf in jax.tree.leaves(pipeline.params, is_leaf=lambda x: hasattr(x, "dequantize"))
    }
    assert ("QuantizedKernel" in kinds) == (name not in ("model.gguf", "expanded.gguf"))
    image = pixels(pipeline(["a red cat"], seeds=[0], width=16, height=16)[0].image)
    assert np.abs(image - reference).mean() < (1e-9 if name == "model.gguf" else 25)


@pytest.mark.parametrize(
    ("dtype", "values"), [("int8", "int8"), ("fp8", "float8_e4m3fn"), ("q8_0", "int8")]
)
def test_quantized_files_stay_quantized_in_memory(files, tmp_path, capsys, dtype, values):
    """In memory too, with the same values. Matrices that Q8_0 does not divide are not quantized."""
    model = toy_model(mlp_ratio=80 / 64, **SIZES)
    checkpoint.write_checkpoint(tmp_path / "in.safetensors", model, toy_params(model), "bfloat16")
    path = tmp_path / ("out.gguf" if dtype == "q8_0" else "out.safetensors")
    assert main(["convert", str(tmp_path / "in.safetensors"), str(path), "--dtype", dtype]) == 0
    errors = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "double blocks" in line and (dtype in line or values in line)
    ]
    assert len(errors) == 1
    assert errors[0].endswith(("e-02", "e-03"))
    named = dict(
        text_encoder=str(files / "t5"), changes=["steps=2", "guidance_scale=1"], dtype="float32"
    )
    small, whole = radiance.load(path, **named), radiance.load(path, weight_format="none", **named)
    remaining = [
        leaf
        for leaf in jax.tree.leaves(small.params, is_leaf=lambda x: hasattr(x, "dequantize"))
        if hasattr(leaf, "dequantize")
    ]
    assert len(remaining) == (12 - 4 if dtype == "q8_0" else 12)
    assert {str(leaf.values.dtype) for leaf in remaining} == {values}
    a, b = (
        pixels(x(["a red cat"], seeds=[0], width=16, height=16)[0].image) for x in (small, whole)
    )
    assert np.abs(a - b).max() <= 1


def test_a_lora_at_a_strength(files, tmp_path):
    """Beside the weights or in them: the same image, in float32."""
    assert (
        main(
            [
                "convert",
                str(files / "pixels.safetensors"),
                str(tmp_path / "base.safetensors"),
                "--dtype",
                "fp32",
            ]
        )
        == 0
    )
    noise = np.random.default_rng(0)
    pair = lora.LoraPair(
        noise.standard_normal((4, 64), np.float32),
        0.1 * noise.standard_normal((192, 4), np.float32),
        0.5,
    )
    lora.write_lora(
        tmp_path / "lora.safetensors",
        lora.LoraWeights(MODEL, {"double_blocks.0.img_attn.qkv": pair}),
        "peft",
        "float32",
    )
    merge = [
        "convert",
        str(tmp_path / "base.safetensors"),
        str(tmp_path / "merged.safetensors"),
        "--lora",
        f"{tmp_path / 'lora.safetensors'}:0.5",
    ]
    assert main(merge) == 0

    def sample_once(name, *more):
        size = ["--size", "16x16", "--dtype", "float32", "--text-encoder", str(files / "t5")]
        return pixels(
            sample(
                tmp_path,
                f"{name}.safetensors",
                tmp_path / f"{name}{len(more)}{''.join(more)[-3:]}",
                *size,
                *more,
            )
        )

    plain, half = (
        sample_once("base"),
        sample_once("base", "--lora", f"{tmp_path / 'lora.safetensors'}:0.5"),
    )
    assert (
        np.abs(plain - sample_once("base", "--lora", f"{tmp_path / 'lora.safetensors'}:0.0")).max()
        <= 1
    )
    assert np.abs(plain - half).max() > 1
    assert np.abs(half - sample_once("merged")).max() <= 1
    paths = sorted(tmp_path.glob("base*/*_seed*.png"))
    origins = [Image.open(path).text["model"] for path in paths]
    assert sum("lora.safetensors" in model for model in origins) == 2
    assert any("+ 0.5 × " in model for model in origins)


def test_a_lokr_is_merged_when_it_is_loaded(files, tmp_path, capsys):
    """It samples what the merged file samples, and the part for a text encoder is reported."""
    base, file = tmp_path / "base.safetensors", tmp_path / "lokr.safetensors"
    assert main(["convert", str(files / "pixels.safetensors"), str(base), "--dtype", "fp32"]) == 0
    rng = np.random.default_rng(0)
    name = "lycoris_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.lokr_w1": 0.3 * rng.standard_normal((12, 4), np.float32),
        f"{name}.lokr_w2": 0.3 * rng.standard_normal((16, 16), np.float32),
        "lora_te1_q.lokr_w1": np.ones((2, 2), np.float32),
    }
    save_file(tensors, file)
    merged = tmp_path / "merged.safetensors"
    capsys.readouterr()
    assert main(["convert", str(base), str(merged), "--lora", f"{file}:0.5"]) == 0
    note = f"{file}: 2 of 3 tensors are used, the others are skipped (1 for text encoders).\n"
    assert note in capsys.readouterr().out
    named = dict(text_encoder=str(files / "t5"), dtype="float32")
    pipeline = radiance.load(base, loras=[(str(file), 0.5)], **named)
    assert note in capsys.readouterr().err
    assert pipeline.origin == f"{base} + 0.5 × {file}"
    for x, y, z in zip(
        *(jax.tree.leaves(p.params) for p in (pipeline, radiance.load(merged, **named))),
        jax.tree.leaves(radiance.load(base, **named).params),
    ):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == z.dtype


def test_a_preset_of_a_run_that_was_trained_at_several_resolutions(tmp_path):
    run = toy_run(
        tmp_path,
        str(tmp_path),
        "data.resolution=32",
        "data.extra_resolutions=512,64",
        "data.bucket_step=16",
        **PLAIN,
    )
    checkpoints = Checkpoints(run.run_dir / "checkpoints")
    checkpoints.save(init_state(run))
    checkpoints.close()
    RunDirectory(run.run_dir).write_metadata(run, {}, 0)
    assert radiance.load(run.run_dir, preset="radiance").run.data.resolution == 512


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("pixels", {}, "needs its text encoder"),
        ("latents", dict(text_encoder="t5"), "give --autoencoder"),
        ("latents", {}, "give --text-encoder .* and .* .give --autoencoder"),
        ("pixels", dict(text_encoder="t5", autoencoder="ae.safetensors"), "needs no autoencoder"),
        ("pixels", dict(text_encoder="t5", preset="radiance-x1"), "did you mean 'radiance-x0'"),
        ("pixels", dict(text_encoder="t5", loras=[("t5/model.safetensors", 1.0)]), "LoRA|module"),
        ("pixels", dict(text_encoder="ae.safetensors"), "T5"),
        ("ae", dict(text_encoder="t5"), "is an autoencoder: give it as --autoencoder"),
        ("t5/model", {}, "T5 text encoder: give it as --text-encoder"),
        ("nothing", {}, "no run directory and no checkpoint"),
    ],
)
def test_missing_or_unfit_files_are_reported_in_a_sentence(files, name, arguments, expected):
    for key in ("text_encoder", "autoencoder"):
        if key in arguments:
            arguments = arguments | {key: str(files / arguments[key])}
    if "loras" in arguments:
        arguments = arguments | {
            "loras": [(str(files / path), strength) for path, strength in arguments["loras"]]
        }
    with pytest.raises((config.ConfigError, CheckpointError), match=expected) as error:
        radiance.load(files / f"{name}.safetensors", **arguments)
    assert "\n" not in str(error.value)


def test_options_describe_what_a_file_does_not_contain(files, tmp_path):
    """A checkpoint from before the marker existed."""
    named = dict(text_encoder=str(files / "t5"), changes=QUICK)
    described = radiance.load(files / "pixels.safetensors", text_ids="sequential", **named)
    assert described.run.model.text_ids == "sequential"
    assert described.run.model.prediction == "x0"
    assert (
        main(
            [
                "convert",
                str(files / "pixels.safetensors"),
                str(tmp_path / "m.safetensors"),
                "--text-ids",
                "sequential",
            ]
        )
        == 0
    )
    assert "__sequential__" in checkpoint.open_checkpoint(tmp_path / "m.safetensors").shapes


def test_products_are_in_float8_by_an_option(files, tmp_path, capsys):
    """A file has no setting for it."""
    file, text_encoder = files / "pixels.safetensors", str(files / "t5")
    loaded = radiance.load(file, text_encoder=text_encoder, product_dtype="float8")
    assert loaded.run.compute.product_dtype == "float8"
    assert radiance.load(file, text_encoder=text_encoder).run.compute.product_dtype == "compute"
    options = ["--product-dtype", "float8", "--dtype", "float32", "--out", tmp_path / "out"]
    options += ["--size", "8x8", "steps=1"]  # little work if it is not refused
    assert "use compute.dtype=bfloat16 with it" in read_error(
        capsys, "sample", file, "--prompt", "x", "--text-encoder", text_encoder, *options
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_directory):
    run = toy_run(
        tmp_path_factory.mktemp("run"),
        data_directory,
        "train.steps=2",
        "train.checkpoint_every=2",
        **PLAIN,
    )
    assert train(run) == 2
    return run


def test_a_run_exports_what_it_takes_to_sample_it(run, tmp_path, capsys):
    out = tmp_path / "export.safetensors"
    assert main(["convert", str(run.run_dir), str(out), "--weights", "ema=0.9"]) == 0
    assert "single blocks" in capsys.readouterr().out
    theirs = radiance.load(run.run_dir, "ema=0.9")(["the digit 2"], seeds=[1])[0]
    ours = radiance.load(out, dtype="float32")(["the digit 2"], seeds=[1])[
        0
    ]  # the hash encoder and settings come with it
    assert np.array_equal(pixels(theirs.image), pixels(ours.image))


def read_error(capsys, *arguments) -> str:
    """The one line that a failing command prints."""
    assert main([str(x) for x in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_run_stays_one_when_it_is_exported_into_itself(run, tmp_path):
    inside = run.run_dir / "export.safetensors"
    assert (
        main(["convert", str(run.run_dir), str(inside), "--weights", "ema=0.9", "--dtype", "bf16"])
        == 0
    )
    assert (
        main(
            [
                "convert",
                str(run.run_dir),
                str(tmp_path / "out.safetensors"),
                "--weights",
                "params",
            ]
        )
        == 0
    )
    inside.unlink()
    assert checkpoint.open_checkpoint(tmp_path / "out.safetensors").dtypes["txt_in.weight"] == "F32"
    assert (
        checkpoint.open_checkpoint(tmp_path / "out.safetensors")
        .metadata["radiance.origin"]
        .endswith("params")
    )


def test_a_validation_loss_belongs_to_the_weights_that_had_it(run, tmp_path):
    def noted(*arguments):
        assert (
            main(
                [
                    "convert",
                    str(arguments[0]),
                    str(tmp_path / "out.safetensors"),
                    *map(str, arguments[1:]),
                ]
            )
            == 0
        )
        return (
            "radiance.validation_loss"
            in checkpoint.open_checkpoint(tmp_path / "out.safetensors").metadata
        )

    assert noted(run.run_dir)
    assert not noted(run.run_dir, "--weights", "params")
    assert main(["convert", str(run.run_dir), str(tmp_path / "a.safetensors")]) == 0
    assert noted(tmp_path / "a.safetensors", "--dtype", "bf16")
    assert not noted(tmp_path / "a.safetensors", "--merge", f"{tmp_path / 'a.safetensors'}:0.5")


def test_contradicting_options_are_rejected(run, files, tmp_path, capsys):
    file, out = files / "pixels.safetensors", tmp_path / "out.safetensors"
    assert "--weights is for run directories" in read_error(
        capsys, "convert", file, out, "--weights", "params"
    )
    assert "contains its prediction" in read_error(
        capsys, "convert", run.run_dir, out, "--prediction", "velocity"
    )
    assert "contains its text_ids" in read_error(
        capsys,
        "sample",
        run.run_dir,
        "--prompt",
        "x",
        "--text-ids",
        "zero",
        "--out",
        tmp_path / "p",
    )
    assert "needs a ratio" in read_error(capsys, "convert", file, out, "--merge", file)
    assert "--extract writes a LoRA" in read_error(
        capsys, "convert", file, out, "--extract", file, "--to", "native"
    )
    assert "a LoRA is written as fp32, bf16 or fp16" in read_error(
        capsys, "convert", file, out, "--extract", file, "--dtype", "q8_0"
    )
    assert "give --text-encoder FILE too" in read_error(
        capsys,
        "sample",
        run.run_dir,
        "--prompt",
        "x",
        "--tokenizer",
        "t",
        "--out",
        tmp_path / "p",
    )
    for more in (
        ["--extract", file, "--lora", "x"],
        ["--lora", "x", "--to", "peft", "--dilate", "conv"],
    ):
        assert (
            "writes a LoRA, and --lora, --head, --dilate and --graft change the model"
            in read_error(capsys, "convert", file, out, *more)
        )
    assert not out.exists()
    with pytest.raises(SystemExit):
        main(["convert", str(file), str(out), "--lora", "x:nan"])
    assert "not a finite number" in capsys.readouterr().err


def test_an_extracted_difference_is_a_lora(files, tmp_path, capsys):
    file, out = files / "pixels.safetensors", tmp_path / "lora.safetensors"
    other = jax.tree.map(lambda x: x * 1.01, toy_params(MODEL))
    checkpoint.write_checkpoint(tmp_path / "other.safetensors", MODEL, other)
    assert (
        main(
            [
                "convert",
                str(tmp_path / "other.safetensors"),
                str(out),
                "--extract",
                str(file),
                "--rank",
                "2",
                "--dtype",
                "fp32",
            ]
        )
        == 0
    )
    tensors = load_file(out)
    assert all(".lora_" in key or key.endswith(".alpha") for key in tensors)
    assert {x.dtype for x in tensors.values()} == {np.dtype("float32")}
    again = ["convert", file, tmp_path / "kohya.safetensors", "--to", "kohya", "--lora"]
    assert "renaming does not change the strength" in read_error(capsys, *again, f"{out}:0.5")
    assert main([str(x) for x in [*again, out]]) == 0


@pytest.mark.parametrize(
    "metadata",
    [
        "garbage",
        "{}",
        '{"text": {}}',
        '{"text": {"encoder": "x"}, "sample": {}, "resolution": 8, "noise_scale": 1}',
        "[" * 9999,
    ],
)
def test_damaged_settings_of_an_export(files, tmp_path, metadata, capsys):
    checkpoint.write_checkpoint(
        tmp_path / "x.safetensors", MODEL, toy_params(MODEL), metadata={"radiance.run": metadata}
    )
    assert "does not contain the settings of sampling" in read_error(
        capsys, "sample", tmp_path / "x.safetensors", "--prompt", "x", "--out", tmp_path / "p"
    )


@pytest.mark.parametrize("loss", ["abc", "0", "nan", "-1"])
def test_a_damaged_loss_stops_a_run_before_it_begins(run, tmp_path, data_directory, loss):
    checkpoint.write_checkpoint(
        tmp_path / "x.safetensors",
        run.model,
        toy_params(run.model),
        metadata={"radiance.validation_loss": loss},
    )
    with pytest.raises(CheckpointError, match="which is not a loss"):
        train(toy_run(tmp_path, data_directory, f"init={tmp_path / 'x.safetensors'}"))
    assert not (tmp_path / "toy").exists()


def test_a_torch_folder_is_complete_or_absent(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "radiance.loading.make_encoder",
        lambda *_: (_ for _ in ()).throw(config.ConfigError("the cache is gone.")),
    )
    assert "the cache is gone" in read_error(
        capsys, "convert", run.run_dir, tmp_path / "torch", "--to", "torch"
    )
    assert not (tmp_path / "torch").exists()


def test_prompts_must_be_utf8(files, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes("ein Häuschen".encode("latin-1"))
    line = read_error(
        capsys,
        "sample",
        files / "pixels.safetensors",
        "--prompts",
        tmp_path / "prompts.txt",
        "--out",
        tmp_path / "p",
    )
    assert "is not UTF-8 text (byte 5)" in line


def test_captions_over_the_limit_are_not_prompts(tmp_path, data_directory):
    """The shortest caption with its prefix, "oh the digit 7", has five tokens with the end."""
    for length, count in ((5, validation.NUM_DEFAULT_PROMPTS), (4, 1)):
        run = toy_run(
            tmp_path, data_directory, "data.caption_prefix=oh ", f"text.max_length={length}"
        )
        encoder = make_encoder(run.text, run.model.text_dim)
        prompts = validation.choose_prompts(run, open_source(run.data, "validation"), encoder)
        encoder(prompts)
        assert len(prompts) == count
        assert (prompts == ("",)) == (length == 4)
        assert length == 4 or all(prompt.startswith("oh ") for prompt in prompts)


def test_the_prompts_of_an_export_are_those_of_the_run(tmp_path):
    """The PyTorch script reads the same texts as our pipeline, with their padding and masking."""
    learned = toy_run(
        tmp_path,
        "unused",
        "text.max_length=40",
        "sample.unconditional=masked",
        padding="learned",
        masking="off",
    )
    for run, width, negative in (
        (learned, 40, 0),
        (toy_run(tmp_path, "unused", "text.max_length=40"), 16, 1),
    ):
        make_prompts_writer(run)(tmp_path)
        result = load_file(tmp_path / "prompts.safetensors")
        assert result["text"].shape == (2, width, 16)
        assert result["negative_text"].shape == (
            1,
            width,
            16,
        )
        assert result["lengths"].tolist() == [4, 4]
        assert result["negative_lengths"].tolist() == [negative]
