"""The table of sharding rules on full-size models; no devices are needed."""

import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from radiance import config
from radiance.distributed.sharding import MESH_AXES, check_divisible, partition_spec
from radiance.model.transformer import make_abstract_params
from radiance.weights.native import flatten_tree


def make_abstract_mesh(*sizes):
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("name", ["chroma1-radiance-x0", "chroma1-base", "flux1-schnell", "large"])
@pytest.mark.parametrize(
    ("sizes", "min_ratio"), [((1, 8, 1), 7.9), ((1, 4, 2), 7.0), ((2, 2, 2), 3.7)]
)
def test_weights_are_sharded_over_fsdp_and_tensor(name, sizes, min_ratio):
    """The ratio is that of all weights to those on one device; at best it is fsdp · tensor."""
    mesh, total, on_device = make_abstract_mesh(*sizes), 0, 0
    for path, leaf in flatten_tree(make_abstract_params(config.MODELS[name])).items():
        num_shards = 1
        for axis in partition_spec(path, leaf.shape, mesh):
            num_shards *= mesh.shape[axis] if axis else 1
        total, on_device = total + leaf.size, on_device + leaf.size / num_shards
    if name != "large":  # its 18 heads do not divide by 4
        check_divisible(make_abstract_params(config.MODELS[name]), mesh)
    # Neither the heads of large nor FLUX's modulation, a quarter of its weights, are sharded by
    # tensor.
    assert total / on_device > min_ratio * (0.8 if name in ("large", "flux1-schnell") else 1)


def test_text_refiner_blocks_are_sharded_as_other_blocks():
    model = config.override(
        config.MODELS["small"],
        ["text_refiner_blocks=2", "patch_embed=bottleneck", "padding=learned"],
    )
    mesh = make_abstract_mesh(1, 4, 2)
    specs = {
        path: partition_spec(path, leaf.shape, mesh)
        for path, leaf in flatten_tree(make_abstract_params(model)).items()
    }
    for layer in ("attention/qkv", "attention/proj", "mlp/linear_in", "mlp/linear_out"):
        refiner_spec = specs[f"refiner/{layer}/kernel"]
        assert refiner_spec == specs[f"double/text/{layer}/kernel"] != PartitionSpec()
    for layer in ("linear_in", "linear_out"):
        assert specs[f"patch_embed/{layer}/kernel"] == PartitionSpec(None, "fsdp")
    assert specs["padding"] == PartitionSpec(None)


@pytest.mark.parametrize("prefix", ["", "ema/0.9999/", "optimizer/1/nu/"])
def test_averages_and_moments_are_sharded_as_their_parameters(prefix):
    path = f"{prefix}single/mlp/linear_in/kernel"
    spec = partition_spec(path, (38, 3072, 12288), make_abstract_mesh(1, 8, 2))
    assert spec == PartitionSpec(None, "fsdp", "tensor")


def test_an_axis_that_does_not_divide_is_replicated_or_an_error():
    params = make_abstract_params(config.MODELS["large"])
    mesh, path = make_abstract_mesh(1, 1, 4), "double/image/attention/qkv/kernel"
    spec = partition_spec(path, flatten_tree(params)[path].shape, mesh)
    assert spec == PartitionSpec(None, "fsdp", None, None, None)
    message = r"has 18 rows or columns, which mesh\.tensor=4 does not divide"
    with pytest.raises(config.ConfigError, match=message):
        check_divisible(params, mesh)
    check_divisible(params, make_abstract_mesh(1, 4, 2))
