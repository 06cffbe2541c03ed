"""Our files in diffusers, and its files here: the same output in float32, through every way a file can take.

Their transformer is right when its mask is made of booleans (their pipeline makes it of floats, which are added to the logits) and
without gradient checkpointing. The one change to it: the approximator's norms have the epsilon of the authors' code, 1e-6, where
theirs is 1.2e-7.
"""

import types

import numpy as np
import pytest
from safetensors.numpy import load_file

from radiance.weights import checkpoint, diffusers
from radiance.weights.convert import convert_checkpoint
from radiance.weights.tensors import concatenated_shape
from tests.helpers.toy_files import LATENT, published, save, stored
from tests.helpers.toy_models import apply, toy_inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
theirs = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytestmark = pytest.mark.reference

INPUTS = toy_inputs(LATENT, lengths=(1, 3, 6))
BOUND = 2e-5


@pytest.fixture
def native_file(tmp_path):
    return save(tmp_path / "native.safetensors", published(LATENT, "float32"), LATENT)


def written_folder(file, folder):
    convert_checkpoint(checkpoint.open_checkpoint(file), folder, export_format="diffusers")
    return folder


def relative_difference(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def ours(file):
    """The output of what is read from the file, under a guidance of 0, which is all that theirs know."""
    model, params = checkpoint.read_checkpoint(file)
    return np.asarray(apply(model, params, INPUTS | dict(guidance=None)))


def run(transformer) -> np.ndarray:
    """Their output on our inputs: text first, and one padding token is seen."""
    for norm in transformer.distilled_guidance_layer.norms:
        norm.eps = 1e-6
    image, text = INPUTS["image"], INPUTS["text"]
    b, rows, columns, channels = image.shape
    at = np.stack([np.zeros((rows, columns)), *np.mgrid[:rows, :columns]], axis=-1).reshape(-1, 3)
    seen = np.arange(text.shape[1]) <= INPUTS["lengths"][:, None]
    mask = np.concatenate([seen, np.ones((b, rows * columns), bool)], axis=1)
    with torch.no_grad():
        y = transformer(
            hidden_states=torch.from_numpy(image.reshape(b, -1, channels)),
            encoder_hidden_states=torch.from_numpy(text),
            timestep=torch.from_numpy(INPUTS["time"]),
            img_ids=torch.from_numpy(at.astype(np.float32)),
            txt_ids=torch.zeros(text.shape[1], 3),
            attention_mask=torch.from_numpy(mask),
        ).sample
    return y.numpy().reshape(image.shape)


def test_a_folder_loads_with_from_pretrained(native_file, tmp_path):
    folder = written_folder(native_file, tmp_path / "folder")
    transformer, report = theirs.ChromaTransformer2DModel.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    difference = relative_difference(ours(native_file), run(transformer))
    print(f"from_pretrained: {difference:.1e}")
    assert difference < BOUND


def test_a_native_file_loads_with_from_single_file(native_file, tmp_path, monkeypatch):
    """Their converter of single files splits matrices at 3072, the hidden size of the published models: here at ours."""
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

    folder = written_folder(native_file, tmp_path / "folder")
    converted = small({name: torch.from_numpy(x) for name, x in load_file(native_file).items()})
    written = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {name: x.numpy().tobytes() for name, x in converted.items()} == {
        name: x.tobytes() for name, x in written.items()
    }

    exported = tmp_path / "exported.safetensors"
    convert_checkpoint(checkpoint.open_checkpoint(folder), exported)
    assert single_file_utils.infer_diffusers_model_type(load_file(exported)) == "chroma"
    transformer = theirs.ChromaTransformer2DModel.from_single_file(
        str(exported), config=str(folder), local_files_only=True
    )
    difference = relative_difference(ours(exported), run(transformer))
    print(f"from_single_file: {difference:.1e}")
    assert difference < BOUND


@pytest.mark.parametrize("sharded", [False, True])
def test_what_save_pretrained_writes_is_read(sharded, tmp_path):
    torch.manual_seed(0)
    transformer = theirs.ChromaTransformer2DModel(
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
    difference = relative_difference(ours(tmp_path / "folder"), run(transformer))
    print(f"save_pretrained, {'several files' if sharded else 'one file'}: {difference:.1e}")
    assert difference < BOUND


def test_the_table_names_all_their_tensors():
    with torch.device("meta"):
        transformer = theirs.ChromaTransformer2DModel(
            **{
                k: v
                for k, v in diffusers.make_transformer_config(LATENT).items()
                if not k.startswith("_")
            }
        )
    shapes = {name: tuple(x.shape) for name, x in transformer.state_dict().items()}
    expected = {name: x.shape for name, x in published(LATENT).items()}
    made = {
        t: shape
        for name in expected
        for t, (_, shape) in diffusers.locate_diffusers_slices(name, expected[name], LATENT).items()
    }
    assert made == shapes
    back = {
        name: concatenated_shape([shapes[t] for t in parts])
        for name, parts in diffusers.map_to_native(shapes).items()
    }
    assert back == expected


def test_bfloat16_folders_hold_the_same_bytes(tmp_path):
    native = save(tmp_path / "x.safetensors", published(LATENT), LATENT)
    folder = written_folder(native, tmp_path / "folder")
    transformer = theirs.ChromaTransformer2DModel.from_pretrained(
        folder, torch_dtype=torch.bfloat16
    )
    transformer.save_pretrained(tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert stored(tmp_path / "again" / name) == stored(folder / name)
    convert_checkpoint(checkpoint.open_checkpoint(tmp_path / "again"), tmp_path / "y.safetensors")
    assert stored(tmp_path / "y.safetensors") == stored(native)
