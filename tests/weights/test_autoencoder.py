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
PLAIN = Autoencoder(
    latent_channels=4, width=32, multipliers=(1, 2), blocks=1
)  # as found from shapes alone
LAYOUTS = ("flux", "diffusers")


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def sentence(error):
    """The message, which must be one line that ends."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


@pytest.fixture
def written(tmp_path):
    """A file of each layout as other tools write them: without our metadata."""
    paths = {layout: tmp_path / layout / "ae.safetensors" for layout in LAYOUTS}
    for layout, path in paths.items():
        autoencoder.write_autoencoder(path, PLAIN, noisy_autoencoder(PLAIN), layout)
        save_file(load_file(path), path)
    return paths


# --- there and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [SIZES, PLAIN])
def test_written_and_read_is_the_same(sizes, layout, tmp_path):
    path = tmp_path / "new" / "ae.safetensors"
    autoencoder.write_autoencoder(path, sizes, noisy_autoencoder(sizes), layout)
    found, params = autoencoder.read_autoencoder(path)
    assert found == sizes
    assert_same(params, noisy_autoencoder(sizes))
    assert all(isinstance(x, jax.Array) and x.dtype == np.float32 for x in jax.tree.leaves(params))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert {k: v.shape for k, v in load_file(path).items()} == autoencoder.autoencoder_shapes(
        sizes, layout
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_and_the_sizes_are_found(layout, written):
    found, params = autoencoder.read_autoencoder(written[layout])
    assert found == PLAIN
    assert_same(params, noisy_autoencoder(PLAIN))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tmp_path):
    autoencoder.write_autoencoder(
        tmp_path / "ae.safetensors", PLAIN, noisy_autoencoder(PLAIN), dtype=dtype
    )
    stored = load_file(tmp_path / "ae.safetensors")
    assert {v.dtype for v in stored.values()} == {np.dtype(getattr(ml_dtypes, dtype, dtype))}
    assert_same(
        autoencoder.read_autoencoder(tmp_path / "ae.safetensors")[1],
        jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), noisy_autoencoder(PLAIN)),
    )


def test_a_folder_of_diffusers(tmp_path):
    """Groups, shift and scale are told by the config.json; a pipeline's folder holds the autoencoder's."""
    folder = tmp_path / "pipeline" / "vae"
    autoencoder.write_autoencoder(folder, SIZES, noisy_autoencoder(SIZES), "diffusers")
    weights = folder / "diffusion_pytorch_model.safetensors"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", weights.name]
    save_file(load_file(weights), weights)
    for path in (weights, folder, tmp_path / "pipeline"):
        found, params = autoencoder.read_autoencoder(path)
        assert found == SIZES
        assert_same(params, noisy_autoencoder(SIZES))
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | dict(shift_factor=None)))
    assert autoencoder.read_autoencoder(folder)[0].shift == 0


def test_tensors_lie_as_published(tmp_path):
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


def test_the_published_file():
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
@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_prefixes(prefix, layout, written, tmp_path):
    renamed = {prefix + key: tensor for key, tensor in load_file(written[layout]).items()}
    renamed["model.diffusion_model.txt_in.weight"] = np.zeros(
        3, np.float32
    )  # a checkpoint of everything holds other networks too
    save_file(renamed, tmp_path / "all.safetensors")
    found, params = autoencoder.read_autoencoder(tmp_path / "all.safetensors")
    assert found == PLAIN
    assert_same(params, noisy_autoencoder(PLAIN))


# --- files that do not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_error_names_every_misfit(layout, written):
    tensors = load_file(written[layout])
    gone, wrong = ("decoder.conv_out.bias", "encoder.conv_in.bias")
    middle = {
        "flux": "decoder.mid.attn_1.k.weight",
        "diffusers": "decoder.mid_block.attentions.0.to_k.weight",
    }[layout]
    del tensors[gone]
    tensors[wrong], tensors[middle] = np.zeros(7, np.float32), tensors[middle].reshape(32, 128)
    tensors["quant_conv.weight"] = tensors["loss.logvar"] = np.zeros(2, np.float32)
    save_file(tensors, written[layout])
    with pytest.raises(CheckpointError) as error:
        autoencoder.read_autoencoder(written[layout])
    text = sentence(error)
    missing, extra, misshaped = (
        text.index(word) for word in ("missing", "not expected", "of another shape")
    )
    assert missing < text.index(gone) < extra
    assert all(
        extra < text.index(name) < misshaped for name in ("quant_conv.weight", "loss.logvar")
    )
    assert f"{wrong} is [7], not [32]" in text[misshaped:]
    assert f"{middle} is [32, 128], not [64, 64" in text[misshaped:]
    assert "encoder.conv_in.weight" not in text  # what fits is not named


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(bad, written, tmp_path):
    tensors = load_file(written["flux"])
    tensors["decoder.up.1.block.0.norm2.bias"][3] = bad
    save_file(tensors, written["flux"])
    with pytest.raises(CheckpointError, match=r"decoder\.up\.1\.block\.0\.norm2\.bias") as error:
        autoencoder.read_autoencoder(written["flux"])
    sentence(error)
    params = jax.tree.map(np.copy, noisy_autoencoder(PLAIN))
    params["decoder"]["conv_out"]["bias"][0] = bad
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias") as error:
        autoencoder.write_autoencoder(tmp_path / "x.safetensors", PLAIN, params)
    sentence(error)
    assert not (tmp_path / "x.safetensors").exists()


def test_files_of_other_kinds(written, tmp_path):
    def refused(told, **tensors):
        save_file(load_file(written["flux"]) | tensors, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=told) as error:
            autoencoder.read_autoencoder(tmp_path / "x.safetensors")
        assert str(tmp_path / "x.safetensors") in sentence(error)

    def zeros(*shape):
        return np.zeros(shape, np.float32)

    refused(
        "not multiples of the first layer's 32",
        **{"encoder.down.1.block.0.conv1.weight": zeros(40, 32, 3, 3)},
    )
    refused("of which the first is 1", **{"encoder.conv_in.weight": zeros(16, 3, 3, 3)})
    refused("but not their shapes", **{"decoder.conv_in.weight": zeros(64)})
    refused("but not their shapes", **{"encoder.conv_in.weight": zeros(0, 3, 3, 3)})
    save_file(
        {"encoder.down.0.block.0.conv1.weight": zeros(32, 32, 3, 3)}, tmp_path / "part.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"has no encoder\.conv_in\.weight, so it is incomplete"
    ) as error:
        autoencoder.read_autoencoder(tmp_path / "part.safetensors")
    sentence(error)
    save_file({"txt_in.weight": zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"no encoder\.down\.0\.block\.0 or encoder\.down_blocks\.0\.resnets\.0",
    ) as error:
        autoencoder.read_autoencoder(tmp_path / "other.safetensors")
    sentence(error)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<html>", "not a config"),
        ("7", "not a config"),
        ('{"norm_num_groups": 5}', "groups=5"),
        ('{"scaling_factor": 0.0}', "scale=0.0 must"),
    ],
)
def test_configs_that_cannot_be(text, told, written):
    (written["diffusers"].parent / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=told) as error:
        autoencoder.read_autoencoder(written["diffusers"])
    sentence(error)


@pytest.mark.parametrize(
    ("text", "told"), [("{", "Its metadata is not"), ('{"norm_num_groups": 5}', "groups=5")]
)
def test_metadata_that_cannot_be(text, told, written):
    save_file(
        load_file(written["flux"]), written["flux"], {autoencoder.AUTOENCODER_METADATA_KEY: text}
    )
    with pytest.raises(CheckpointError, match=told) as error:
        autoencoder.read_autoencoder(written["flux"])
    sentence(error)


def test_parameters_that_do_not_fit(tmp_path):
    params = jax.tree.map(np.copy, noisy_autoencoder(PLAIN))
    params["encoder"]["conv_in"]["bias"] = np.zeros(7, np.float32)
    del params["decoder"]["norm_out"]["scale"]
    params["decoder"]["extra"] = np.zeros(1, np.float32)
    with pytest.raises(CheckpointError) as error:
        autoencoder.write_autoencoder(tmp_path / "x.safetensors", PLAIN, params)
    text = sentence(error)
    assert "missing decoder/norm_out/scale" in text
    assert "not expected decoder/extra" in text
    assert "encoder/conv_in/bias is [7], not [32]" in text
    with pytest.raises(CheckpointError, match="only the layout diffusers supports") as error:
        autoencoder.write_autoencoder(tmp_path / "folder", PLAIN, noisy_autoencoder(PLAIN), "flux")
    sentence(error)
    assert list(tmp_path.iterdir()) == []


# --- diffusers as the judge ---------------------------------------------------------------------------------------------

JUDGED = Autoencoder(width=32, multipliers=(1, 2, 2, 2))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="compares with PyTorch")


@pytest.fixture(scope="module")
def diffusers(torch):
    return pytest.importorskip("diffusers", reason="compares with diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    autoencoder.write_autoencoder(folder / "vae", JUDGED, noisy_autoencoder(JUDGED), "diffusers")
    autoencoder.write_autoencoder(
        folder / "ae.safetensors", JUDGED, noisy_autoencoder(JUDGED), "flux"
    )
    return folder


@pytest.fixture(scope="module")
def theirs(diffusers, folder):
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


def far(ours, theirs):
    """The largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def packed(latents):
    """[b, c, h, w] to [b, rows, columns, c·2·2], one number at a time."""
    b, c, height, width = latents.shape
    out = np.empty((b, height // 2, width // 2, 4 * c), np.float32)
    for row in range(height):
        for column in range(width):
            out[:, row // 2, column // 2, row % 2 * 2 + column % 2 :: 4] = latents[
                :, :, row, column
            ]
    return out


@pytest.mark.reference
def test_encode_is_that_of_diffusers(torch, theirs):
    images = np.random.default_rng(1).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
    latents = (posterior.mean.numpy() - theirs.config.shift_factor) * theirs.config.scaling_factor
    encoder = jax.jit(lambda params, x: network.encode_images(JUDGED, params, x, dtype="float32"))
    difference = far(encoder(noisy_autoencoder(JUDGED), images), packed(latents))
    print(f"encode: {difference:.1e}")
    assert np.std(latents) > 0.1
    assert difference < 2e-5


@pytest.mark.reference
def test_decode_and_its_gradient_are_those_of_diffusers(torch, theirs):
    draw = np.random.default_rng(2)
    latents = draw.standard_normal((2, 16, 4, 6), np.float32)
    weights = draw.standard_normal((2, 32, 48, 3), np.float32)
    x = torch.tensor(latents, requires_grad=True)
    images = theirs.decode(
        x / theirs.config.scaling_factor + theirs.config.shift_factor
    ).sample.permute(0, 2, 3, 1)
    (gradient,) = torch.autograd.grad((images * torch.tensor(weights)).sum(), x)

    def loss(latents, params):
        images = network.decode_latents(JUDGED, params, latents, dtype="float32")
        return jnp.vdot(weights, images), images

    ours, painted = jax.jit(jax.grad(loss, has_aux=True))(
        packed(latents), noisy_autoencoder(JUDGED)
    )
    differences = far(painted, images.detach()), far(ours, packed(gradient.numpy()))
    print("decode: {:.1e}, gradient: {:.1e}".format(*differences))
    assert np.std(painted) > 0.1
    assert max(differences) < 2e-5


@pytest.mark.reference
def test_names_and_shapes_of_the_full_size(torch, diffusers):
    with torch.device("meta"):
        model = diffusers.AutoencoderKL.from_config(
            autoencoder.make_autoencoder_config(Autoencoder())
        )
    assert {
        k: tuple(v.shape) for k, v in model.state_dict().items()
    } == autoencoder.autoencoder_shapes(Autoencoder(), "diffusers")


@pytest.mark.reference
def test_the_published_layout_is_what_diffusers_converts(diffusers, folder):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    converted = convert_ldm_vae_checkpoint(
        load_file(folder / "ae.safetensors"), autoencoder.make_autoencoder_config(JUDGED)
    )
    expected = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(converted[name], tensor, err_msg=name)
