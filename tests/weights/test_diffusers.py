"""diffusers reads our files and we read its files, with the same output in float32.

Its transformer is correct if the mask has booleans (its pipeline uses floats, which are added to
the logits), and without gradient checkpointing. The tests change one thing: the approximator's
norms get the epsilon of the authors' code, 1e-6, in place of 1.2e-7.
"""

import types

import numpy as np
import pytest
from safetensors.numpy import load_file

from radiance.weights import checkpoint, diffusers, lora
from radiance.weights.convert import convert_checkpoint
from radiance.weights.tensors import concatenated_shape
from tests.helpers.toy_files import LATENT, published, save, stored
from tests.helpers.toy_loras import module_shapes, toy_lora
from tests.helpers.toy_models import apply, toy_inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
diffusers_package = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytestmark = pytest.mark.reference

INPUTS = toy_inputs(LATENT, lengths=(1, 3, 6))
BOUND = 2e-5


@pytest.fixture
def native_file(tmp_path):
    return save(tmp_path / "native.safetensors", published(LATENT, "float32"), LATENT)


def write_folder(file, folder):
    convert_checkpoint(checkpoint.open_checkpoint(file), folder, export_format="diffusers")
    return folder


def relative_difference(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def compute_our_output(file):
    """Return our output for a file at guidance 0, the only one that diffusers supports."""
    model, params = checkpoint.read_checkpoint(file)
    return np.asarray(apply(model, params, INPUTS | dict(guidance=None)))


def compute_diffusers_output(transformer) -> np.ndarray:
    """Return the output of diffusers: text is first, and one padding token is visible."""
    for norm in transformer.distilled_guidance_layer.norms:
        norm.eps = 1e-6
    image, text = INPUTS["image"], INPUTS["text"]
    b, rows, columns, channels = image.shape
    positions = np.stack([np.zeros((rows, columns)), *np.mgrid[:rows, :columns]], axis=-1).reshape(
        -1, 3
    )
    visible = np.arange(text.shape[1]) <= INPUTS["lengths"][:, None]
    mask = np.concatenate([visible, np.ones((b, rows * columns), bool)], axis=1)
    with torch.no_grad():
        y = transformer(
            hidden_states=torch.from_numpy(image.reshape(b, -1, channels)),
            encoder_hidden_states=torch.from_numpy(text),
            timestep=torch.from_numpy(INPUTS["time"]),
            img_ids=torch.from_numpy(positions.astype(np.float32)),
            txt_ids=torch.zeros(text.shape[1], 3),
            attention_mask=torch.from_numpy(mask),
        ).sample
    return y.numpy().reshape(image.shape)


@pytest.mark.parametrize("prefix", ["transformer.", "_orig_mod.", "module.model."])
def test_prefixes_are_removed(prefix, native_file, tmp_path):
    folder = write_folder(native_file, tmp_path / "folder")
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = {prefix + name: x for name, x in load_file(path).items()}
    save(path, tensors | {"vae.other": np.zeros(3, np.float32)})
    expected = checkpoint.open_checkpoint(native_file)
    renamed = checkpoint.open_checkpoint(folder)
    for name in expected.shapes:
        np.testing.assert_array_equal(renamed.get_tensor(name), expected.get_tensor(name))


def test_from_pretrained_loads_our_folder(native_file, tmp_path):
    folder = write_folder(native_file, tmp_path / "folder")
    transformer, report = diffusers_package.ChromaTransformer2DModel.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    difference = relative_difference(
        compute_our_output(native_file), compute_diffusers_output(transformer)
    )
    print(f"from_pretrained: {difference:.1e}")
    assert difference < BOUND


def test_from_single_file_loads_our_native_file(native_file, tmp_path, monkeypatch):
    """Its converter splits matrices at 3072, the published hidden size; the test sets ours."""
    from diffusers.loaders import single_file_model, single_file_utils

    convert_ = single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers
    code = convert_.__code__
    assert code.co_consts.count(3072) == 1
    code = code.replace(co_consts=tuple(LATENT.hidden if c == 3072 else c for c in code.co_consts))
    small = types.FunctionType(code, convert_.__globals__)
    monkeypatch.setitem(
        single_file_model.SINGLE_FILE_LOADABLE_CLASSES["ChromaTransformer2DModel"],
        "checkpoint_mapping_fn",
        small,
    )

    folder = write_folder(native_file, tmp_path / "folder")
    converted = small({name: torch.from_numpy(x) for name, x in load_file(native_file).items()})
    written = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {name: x.numpy().tobytes() for name, x in converted.items()} == {
        name: x.tobytes() for name, x in written.items()
    }

    exported = tmp_path / "exported.safetensors"
    convert_checkpoint(checkpoint.open_checkpoint(folder), exported)
    assert single_file_utils.infer_diffusers_model_type(load_file(exported)) == "chroma"
    transformer = diffusers_package.ChromaTransformer2DModel.from_single_file(
        str(exported), config=str(folder), local_files_only=True
    )
    difference = relative_difference(
        compute_our_output(exported), compute_diffusers_output(transformer)
    )
    print(f"from_single_file: {difference:.1e}")
    assert difference < BOUND


def test_loras_are_applied(native_file, tmp_path):
    """Every pair that we write arrives, also those of queries, keys and values, at our scale."""
    pytest.importorskip("peft", reason="diffusers needs PEFT for LoRAs")
    base = checkpoint.open_checkpoint(native_file)
    modules = list(module_shapes(LATENT, blocks_only=True))
    added = toy_lora(LATENT, modules)
    path = tmp_path / "lora.safetensors"
    lora.write_lora(path, added, "diffusers", "float32")
    transformer = diffusers_package.ChromaTransformer2DModel.from_pretrained(
        write_folder(native_file, tmp_path / "folder")
    )
    pipeline = diffusers_package.ChromaPipeline
    tensors, alphas = pipeline.lora_state_dict(path, return_alphas=True)
    pipeline.load_lora_into_transformer(tensors, alphas, transformer)
    convert_checkpoint(lora.merge_lora(base, added), tmp_path / "merged.safetensors")
    difference = relative_difference(
        compute_our_output(tmp_path / "merged.safetensors"), compute_diffusers_output(transformer)
    )
    print(f"LoRA: {difference:.1e}")
    assert difference < BOUND


@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_save_pretrained_are_read(sharded, tmp_path):
    torch.manual_seed(0)
    transformer = diffusers_package.ChromaTransformer2DModel(
        **{
            k: v
            for k, v in diffusers.make_transformer_config(LATENT).items()
            if not k.startswith("_")
        }
    )
    for x in transformer.parameters():
        torch.nn.init.normal_(x, 1.0 if x.ndim == 1 else 0.0, 0.1)
    transformer.save_pretrained(tmp_path / "folder", max_shard_size="200KB" if sharded else "1GB")
    assert (tmp_path / "folder" / "diffusion_pytorch_model.safetensors").exists() != sharded
    difference = relative_difference(
        compute_our_output(tmp_path / "folder"), compute_diffusers_output(transformer)
    )
    print(f"save_pretrained, {'several files' if sharded else 'one file'}: {difference:.1e}")
    assert difference < BOUND


def test_table_names_all_tensors_of_diffusers():
    with torch.device("meta"):
        transformer = diffusers_package.ChromaTransformer2DModel(
            **{
                k: v
                for k, v in diffusers.make_transformer_config(LATENT).items()
                if not k.startswith("_")
            }
        )
    shapes = {name: tuple(x.shape) for name, x in transformer.state_dict().items()}
    expected = {name: x.shape for name, x in published(LATENT).items()}
    slices = {
        t: shape
        for name in expected
        for t, (_, shape) in diffusers.locate_diffusers_slices(name, expected[name], LATENT).items()
    }
    assert slices == shapes
    native_shapes = {
        name: concatenated_shape([shapes[t] for t in parts])
        for name, parts in diffusers.map_to_native(shapes).items()
    }
    assert native_shapes == expected


def test_bfloat16_folders_hold_the_same_bytes(tmp_path):
    native = save(tmp_path / "x.safetensors", published(LATENT), LATENT)
    folder = write_folder(native, tmp_path / "folder")
    transformer = diffusers_package.ChromaTransformer2DModel.from_pretrained(
        folder, torch_dtype=torch.bfloat16
    )
    transformer.save_pretrained(tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert stored(tmp_path / "again" / name) == stored(folder / name)
    convert_checkpoint(checkpoint.open_checkpoint(tmp_path / "again"), tmp_path / "y.safetensors")
    assert stored(tmp_path / "y.safetensors") == stored(native)
