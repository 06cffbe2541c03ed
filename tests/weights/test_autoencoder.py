"""Autoencoder files are read and written in both layouts; wrong files are errors."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from radiance.base.errors import CheckpointError
from radiance.model import autoencoder as network
from radiance.model.autoencoder import Autoencoder
from radiance.weights import autoencoder
from tests.helpers.toy_models import noisy_autoencoder

SIZES = Autoencoder(
    latent_channels=4, width=8, multipliers=(1, 2, 2), blocks=1, groups=4, shift=0.5, scale=1.5
)
# shapes give all of its settings
PLAIN = Autoencoder(latent_channels=4, width=32, multipliers=(1, 2), blocks=1)
LAYOUTS = ("flux", "diffusers")


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def read_message(error):
    """Return the message, which must be one line with an end."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


@pytest.fixture
def written(tmp_path):
    """Write a file of each layout without our metadata, as other tools do."""
    paths = {layout: tmp_path / layout / "ae.safetensors" for layout in LAYOUTS}
    for layout, path in paths.items():
        autoencoder.write_autoencoder(path, PLAIN, noisy_autoencoder(PLAIN), layout)
        save_file(load_file(path), path)
    return paths


# --- round trip -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [SIZES, PLAIN])
def test_written_autoencoder_is_read_back(sizes, layout, tmp_path):
    path = tmp_path / "new" / "ae.safetensors"
    autoencoder.write_autoencoder(path, sizes, noisy_autoencoder(sizes), layout)
    sizes_read, params = autoencoder.read_autoencoder(path)
    assert sizes_read == sizes
    assert_same(params, noisy_autoencoder(sizes))
    assert all(isinstance(x, jax.Array) and x.dtype == np.float32 for x in jax.tree.leaves(params))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert {k: v.shape for k, v in load_file(path).items()} == autoencoder.autoencoder_shapes(
        sizes, layout
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_and_sizes_are_detected(layout, written):
    sizes_read, params = autoencoder.read_autoencoder(written[layout])
    assert sizes_read == PLAIN
    assert_same(params, noisy_autoencoder(PLAIN))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds(dtype, tmp_path):
    autoencoder.write_autoencoder(
        tmp_path / "ae.safetensors", PLAIN, noisy_autoencoder(PLAIN), dtype=dtype
    )
    stored = load_file(tmp_path / "ae.safetensors")
    assert {v.dtype for v in stored.values()} == {np.dtype(getattr(ml_dtypes, dtype, dtype))}
    assert_same(
        autoencoder.read_autoencoder(tmp_path / "ae.safetensors")[1],
        jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), noisy_autoencoder(PLAIN)),
    )


def test_diffusers_folder_is_read(tmp_path):
    """config.json gives groups, shift and scale; a pipeline's folder contains the autoencoder's."""
    folder = tmp_path / "pipeline" / "vae"
    autoencoder.write_autoencoder(folder, SIZES, noisy_autoencoder(SIZES), "diffusers")
    weights = folder / "diffusion_pytorch_model.safetensors"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", weights.name]
    save_file(load_file(weights), weights)
    for path in (weights, folder, tmp_path / "pipeline"):
        sizes_read, params = autoencoder.read_autoencoder(path)
        assert sizes_read == SIZES
        assert_same(params, noisy_autoencoder(SIZES))
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | dict(shift_factor=None)))
    assert autoencoder.read_autoencoder(folder)[0].shift == 0


def test_layouts_are_the_published_ones(tmp_path):
    p = noisy_autoencoder(SIZES)
    for layout in LAYOUTS:
        autoencoder.write_autoencoder(tmp_path / f"{layout}.safetensors", SIZES, p, layout)
    flux, diffusers = (load_file(tmp_path / f"{layout}.safetensors") for layout in LAYOUTS)
    same = np.testing.assert_array_equal
    for stored, name in (
        (flux, "decoder.up.0.block.1.conv2"),
        (diffusers, "decoder.up_blocks.2.resnets.1.conv2"),
    ):
        same(
            stored[f"{name}.weight"][5, 3, 0, 2],
            p["decoder"]["levels"][0]["blocks"][1]["conv2"]["kernel"][0, 2, 3, 5],
        )
        same(stored[f"{name}.bias"], p["decoder"]["levels"][0]["blocks"][1]["conv2"]["bias"])
    query = p["encoder"]["middle"]["attention"]["query"]["kernel"]
    assert query.shape == (16, 16)
    same(flux["encoder.mid.attn_1.q.weight"], query.T.reshape(16, 16, 1, 1))
    same(diffusers["encoder.mid_block.attentions.0.to_q.weight"], query.T)
    same(
        flux["encoder.down.1.block.0.nin_shortcut.weight"][3, 2, 0, 0],
        p["encoder"]["levels"][1]["blocks"][0]["shortcut"]["kernel"][0, 0, 2, 3],
    )
    same(flux["decoder.norm_out.weight"], p["decoder"]["norm_out"]["scale"])


def test_shapes_are_those_of_the_published_file():
    """`ae.safetensors` of FLUX.1: 244 tensors; names and shapes from its model card's viewer."""
    shapes = autoencoder.autoencoder_shapes(Autoencoder(), "flux")
    assert len(shapes) == 244
    assert sum(map(np.prod, shapes.values())) == 83_819_683
    assert shapes["encoder.conv_out.weight"] == (32, 512, 3, 3)
    assert shapes["decoder.conv_in.weight"] == (512, 16, 3, 3)
    assert shapes["decoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    assert shapes["encoder.down.2.downsample.conv.bias"] == (512,)
    assert "encoder.down.3.downsample.conv.weight" not in shapes
    assert "decoder.up.3.block.2.conv1.weight" in shapes
    assert "encoder.down.3.block.2.conv1.weight" not in shapes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "prefix", ["first_stage_model.", "vae.", "_orig_mod.", "module.model.", "autoencoder.module."]
)
def test_prefixes_are_removed(prefix, layout, written, tmp_path):
    renamed = {prefix + key: tensor for key, tensor in load_file(written[layout]).items()}
    # a checkpoint of all networks
    renamed["model.diffusion_model.txt_in.weight"] = np.zeros(3, np.float32)
    save_file(renamed, tmp_path / "all.safetensors")
    sizes_read, params = autoencoder.read_autoencoder(tmp_path / "all.safetensors")
    assert sizes_read == PLAIN
    assert_same(params, noisy_autoencoder(PLAIN))


# --- wrong files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_error_names_every_misfit(layout, written):
    tensors = load_file(written[layout])
    removed, wrong = ("decoder.conv_out.bias", "encoder.conv_in.bias")
    middle = {
        "flux": "decoder.mid.attn_1.k.weight",
        "diffusers": "decoder.mid_block.attentions.0.to_k.weight",
    }[layout]
    del tensors[removed]
    tensors[wrong], tensors[middle] = np.zeros(7, np.float32), tensors[middle].reshape(32, 128)
    tensors["quant_conv.weight"] = tensors["loss.logvar"] = np.zeros(2, np.float32)
    save_file(tensors, written[layout])
    with pytest.raises(CheckpointError) as error:
        autoencoder.read_autoencoder(written[layout])
    text = read_message(error)
    missing, extra, misshaped = (
        text.index(word) for word in ("missing", "not expected", "of another shape")
    )
    assert missing < text.index(removed) < extra
    assert all(
        extra < text.index(name) < misshaped for name in ("quant_conv.weight", "loss.logvar")
    )
    assert f"{wrong} is [7], not [32]" in text[misshaped:]
    assert f"{middle} is [32, 128], not [64, 64" in text[misshaped:]
    assert "encoder.conv_in.weight" not in text  # tensors that fit are not named


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_values_are_errors(bad, written, tmp_path):
    tensors = load_file(written["flux"])
    tensors["decoder.up.1.block.0.norm2.bias"][3] = bad
    save_file(tensors, written["flux"])
    with pytest.raises(CheckpointError, match=r"decoder\.up\.1\.block\.0\.norm2\.bias") as error:
        autoencoder.read_autoencoder(written["flux"])
    read_message(error)
    params = jax.tree.map(np.copy, noisy_autoencoder(PLAIN))
    params["decoder"]["conv_out"]["bias"][0] = bad
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias") as error:
        autoencoder.write_autoencoder(tmp_path / "x.safetensors", PLAIN, params)
    read_message(error)
    assert not (tmp_path / "x.safetensors").exists()


def test_files_of_other_kinds_are_errors(written, tmp_path):
    def assert_error(message, **tensors):
        save_file(load_file(written["flux"]) | tensors, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=message) as error:
            autoencoder.read_autoencoder(tmp_path / "x.safetensors")
        assert str(tmp_path / "x.safetensors") in read_message(error)

    def zeros(*shape):
        return np.zeros(shape, np.float32)

    assert_error(
        "not multiples of the first layer's 32",
        **{"encoder.down.1.block.0.conv1.weight": zeros(40, 32, 3, 3)},
    )
    assert_error("that begin with 1", **{"encoder.conv_in.weight": zeros(16, 3, 3, 3)})
    assert_error("but not their shapes", **{"decoder.conv_in.weight": zeros(64)})
    assert_error("but not their shapes", **{"encoder.conv_in.weight": zeros(0, 3, 3, 3)})
    save_file(
        {"encoder.down.0.block.0.conv1.weight": zeros(32, 32, 3, 3)}, tmp_path / "part.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"has no encoder\.conv_in\.weight, so it is incomplete"
    ) as error:
        autoencoder.read_autoencoder(tmp_path / "part.safetensors")
    read_message(error)
    save_file({"txt_in.weight": zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"no encoder\.down\.0\.block\.0 or encoder\.down_blocks\.0\.resnets\.0",
    ) as error:
        autoencoder.read_autoencoder(tmp_path / "other.safetensors")
    read_message(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>", "not a config"),
        ("7", "not a config"),
        ('{"norm_num_groups": 5}', "groups=5"),
        ('{"scaling_factor": 0.0}', "scale=0.0 must"),
    ],
)
def test_invalid_config_is_an_error(text, message, written):
    (written["diffusers"].parent / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        autoencoder.read_autoencoder(written["diffusers"])
    read_message(error)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "Its metadata is not"), ('{"norm_num_groups": 5}', "groups=5")]
)
def test_invalid_metadata_is_an_error(text, message, written):
    save_file(
        load_file(written["flux"]), written["flux"], {autoencoder.AUTOENCODER_METADATA_KEY: text}
    )
    with pytest.raises(CheckpointError, match=message) as error:
        autoencoder.read_autoencoder(written["flux"])
    read_message(error)


def test_wrong_parameters_are_an_error(tmp_path):
    params = jax.tree.map(np.copy, noisy_autoencoder(PLAIN))
    params["encoder"]["conv_in"]["bias"] = np.zeros(7, np.float32)
    del params["decoder"]["norm_out"]["scale"]
    params["decoder"]["extra"] = np.zeros(1, np.float32)
    with pytest.raises(CheckpointError) as error:
        autoencoder.write_autoencoder(tmp_path / "x.safetensors", PLAIN, params)
    text = read_message(error)
    assert "missing decoder/norm_out/scale" in text
    assert "not expected decoder/extra" in text
    assert "encoder/conv_in/bias is [7], not [32]" in text
    with pytest.raises(CheckpointError, match="only the layout diffusers supports") as error:
        autoencoder.write_autoencoder(tmp_path / "folder", PLAIN, noisy_autoencoder(PLAIN), "flux")
    read_message(error)
    assert list(tmp_path.iterdir()) == []


# --- comparison with diffusers --------------------------------------------------------------------

COMPARED = Autoencoder(width=32, multipliers=(1, 2, 2, 2))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="compares with PyTorch")


@pytest.fixture(scope="module")
def diffusers(torch):
    return pytest.importorskip("diffusers", reason="compares with diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    autoencoder.write_autoencoder(
        folder / "vae", COMPARED, noisy_autoencoder(COMPARED), "diffusers"
    )
    autoencoder.write_autoencoder(
        folder / "ae.safetensors", COMPARED, noisy_autoencoder(COMPARED), "flux"
    )
    return folder


@pytest.fixture(scope="module")
def diffusers_model(diffusers, folder):
    model, report = diffusers.AutoencoderKL.from_pretrained(
        folder / "vae", output_loading_info=True
    )
    assert not any(report.values()), report
    assert (
        model.config.shift_factor,
        model.config.scaling_factor,
        model.config.norm_num_groups,
    ) == (0.1159, 0.3611, 32)
    return model


def relative_difference(x, expected):
    """Return the largest difference, relative to the largest value."""
    x, expected = np.asarray(x), np.asarray(expected)
    assert x.shape == expected.shape
    assert np.isfinite(expected).all()
    return np.abs(x - expected).max() / np.abs(expected).max()


def pack_latents(latents):
    """Pack [b, c, h, w] into [b, rows, columns, c·2·2], one number at a time."""
    b, c, height, width = latents.shape
    out = np.empty((b, height // 2, width // 2, 4 * c), np.float32)
    for row in range(height):
        for column in range(width):
            out[:, row // 2, column // 2, row % 2 * 2 + column % 2 :: 4] = latents[
                :, :, row, column
            ]
    return out


@pytest.mark.reference
def test_encoding_agrees_with_diffusers(torch, diffusers_model):
    images = np.random.default_rng(1).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = diffusers_model.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
    latents = (
        posterior.mean.numpy() - diffusers_model.config.shift_factor
    ) * diffusers_model.config.scaling_factor
    encoder = jax.jit(lambda params, x: network.encode_images(COMPARED, params, x, dtype="float32"))
    difference = relative_difference(
        encoder(noisy_autoencoder(COMPARED), images), pack_latents(latents)
    )
    print(f"encode: {difference:.1e}")
    assert np.std(latents) > 0.1
    assert difference < 2e-5


@pytest.mark.reference
def test_decoding_and_its_gradient_agree_with_diffusers(torch, diffusers_model):
    rng = np.random.default_rng(2)
    latents = rng.standard_normal((2, 16, 4, 6), np.float32)
    weights = rng.standard_normal((2, 32, 48, 3), np.float32)
    x = torch.tensor(latents, requires_grad=True)
    images = diffusers_model.decode(
        x / diffusers_model.config.scaling_factor + diffusers_model.config.shift_factor
    ).sample.permute(0, 2, 3, 1)
    (gradient,) = torch.autograd.grad((images * torch.tensor(weights)).sum(), x)

    def loss(latents, params):
        images = network.decode_latents(COMPARED, params, latents, dtype="float32")
        return jnp.vdot(weights, images), images

    our_gradient, decoded = jax.jit(jax.grad(loss, has_aux=True))(
        pack_latents(latents), noisy_autoencoder(COMPARED)
    )
    differences = (
        relative_difference(decoded, images.detach()),
        relative_difference(our_gradient, pack_latents(gradient.numpy())),
    )
    print("decode: {:.1e}, gradient: {:.1e}".format(*differences))
    assert np.std(decoded) > 0.1
    assert max(differences) < 2e-5


@pytest.mark.reference
def test_full_size_has_the_names_and_shapes_of_diffusers(torch, diffusers):
    with torch.device("meta"):
        model = diffusers.AutoencoderKL.from_config(
            autoencoder.make_autoencoder_config(Autoencoder())
        )
    assert {
        k: tuple(v.shape) for k, v in model.state_dict().items()
    } == autoencoder.autoencoder_shapes(Autoencoder(), "diffusers")


@pytest.mark.reference
def test_diffusers_converts_the_published_layout(diffusers, folder):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    converted = convert_ldm_vae_checkpoint(
        load_file(folder / "ae.safetensors"), autoencoder.make_autoencoder_config(COMPARED)
    )
    expected = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(converted[name], tensor, err_msg=name)
