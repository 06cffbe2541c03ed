"""The table of rules, on the full-size models: no devices are needed to see where everything lies."""

import math

import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from radiance import config
from radiance.base.trees import flatten_tree
from radiance.distributed.sharding import MESH_AXES, check_divisible, partition_spec
from radiance.model.transformer import make_abstract_params


def mesh(*sizes):
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("name", ["chroma1-radiance-x0", "chroma1-base", "flux1-schnell", "large"])
@pytest.mark.parametrize(("sizes", "least"), [((1, 8, 1), 7.9), ((1, 4, 2), 7.0), ((2, 2, 2), 3.7)])
def test_weights_are_spread_over_the_devices_that_share_them(name, sizes, least):
    """What one device holds of the whole, against one part in `fsdp · tensor`."""
    devices, whole, held = mesh(*sizes), 0, 0
    for path, leaf in flatten_tree(make_abstract_params(config.MODELS[name])).items():
        parts = math.prod(
            devices.shape[axis] for axis in partition_spec(path, leaf.shape, devices) if axis
        )
        whole, held = whole + leaf.size, held + leaf.size / parts
    if name != "large":  # whose 18 heads do not divide by 4
        check_divisible(make_abstract_params(config.MODELS[name]), devices)
    # FLUX's modulation, a quarter of it, is not split by `tensor`; nor are large's heads.
    assert whole / held > least * (0.8 if name in ("large", "flux1-schnell") else 1)


def test_text_blocks_lie_as_the_others():
    model = config.override(
        config.MODELS["small"],
        ["text_refiner_blocks=2", "patch_embed=bottleneck", "padding=learned"],
    )
    leaves, devices = flatten_tree(make_abstract_params(model)), mesh(1, 4, 2)
    places = {path: partition_spec(path, leaf.shape, devices) for path, leaf in leaves.items()}
    for part in ("attention/qkv", "attention/proj", "mlp/linear_in", "mlp/linear_out"):
        assert (
            places[f"refiner/{part}/kernel"]
            == places[f"double/text/{part}/kernel"]
            != PartitionSpec()
        )
    assert (
        places["patch_embed/linear_in/kernel"]
        == places["patch_embed/linear_out/kernel"]
        == PartitionSpec(None, "fsdp")
    )
    assert places["padding"] == PartitionSpec(None)


def test_averages_and_moments_lie_as_their_parameters():
    devices = mesh(1, 8, 2)
    path = "single/mlp/linear_in/kernel"
    expected = PartitionSpec(None, "fsdp", "tensor")
    assert all(
        partition_spec(prefix + path, (38, 3072, 12288), devices) == expected
        for prefix in ("", "ema/0.9999/", "optimizer/1/nu/")
    )


def test_what_does_not_divide_is_whole_or_refused():
    model = config.MODELS["large"]
    devices = mesh(1, 1, 4)
    kernel = flatten_tree(make_abstract_params(model))["double/image/attention/qkv/kernel"]
    assert partition_spec(
        "double/image/attention/qkv/kernel", kernel.shape, devices
    ) == PartitionSpec(None, "fsdp", None, None, None)
    with pytest.raises(
        config.ConfigError,
        match=r"has 18 rows or columns to be split, which mesh.tensor=4 does not divide",
    ):
        check_divisible(make_abstract_params(model), devices)
    check_divisible(make_abstract_params(model), mesh(1, 4, 2))
