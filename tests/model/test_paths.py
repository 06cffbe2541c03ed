import jax

from radiance.base.trees import flatten_tree
from radiance.model.paths import count_inputs, is_always_float32, is_block_matrix
from radiance.model.transformer import make_abstract_params
from tests.helpers.toy_models import toy_model

MODEL = toy_model(text_refiner_blocks=1, padding="learned", masking="off")


def leaves() -> dict[str, jax.Array]:
    return flatten_tree(make_abstract_params(MODEL))


def test_block_matrices_are_the_kernels_of_all_blocks():
    streams = ("refiner", "double/image", "double/text", "single")
    layers = ("attention/qkv", "attention/proj", "mlp/linear_in", "mlp/linear_out")
    expected = {f"{stream}/{layer}/kernel" for stream in streams for layer in layers}
    assert {path for path in leaves() if is_block_matrix(path)} == expected


def test_inputs_of_a_matrix_are_its_leading_axes():
    shapes = {path: leaf.shape for path, leaf in leaves().items()}
    mlp_dim = round(MODEL.hidden * MODEL.mlp_ratio)
    for path, expected in {
        "single/attention/qkv/kernel": MODEL.hidden,
        "single/attention/proj/kernel": MODEL.hidden,  # heads and channels
        "single/mlp/linear_out/kernel": mlp_dim,
    }.items():
        assert count_inputs(path, shapes[path]) == expected


def test_the_pixel_embedder_is_always_float32():
    expected = {"head/embedder/kernel", "head/embedder/bias"}
    assert {path for path in leaves() if is_always_float32(path)} == expected
