"""Work counted in compiled programs against closed forms."""

import jax
import jax.numpy as jnp
import pytest

from radiance.planning import hlo_cost, hlo_work
from tests.helpers.toy_runs import output_of

# Collectives of known sizes in loops, over a 2×4 mesh of 8 devices with 16 float32 values each.
PROGRAM = """
import jax, jax.numpy as jnp
from functools import partial
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

def body(x):
    def step(x, _):
        gathered = jax.lax.all_gather(x, "b", tiled=True)
        x = jax.lax.psum_scatter(jnp.sin(gathered), "b", tiled=True)
        x = jnp.cos(jax.lax.psum(x, "a"))
        ring = [(i, (i + 1) % 4) for i in range(4)]
        permute = lambda x, _: (jax.lax.ppermute(jnp.sin(x), "b", ring), None)
        x, _ = jax.lax.scan(permute, x, length=3)
        return jax.lax.all_to_all(x.reshape(4, 4), "b", 0, 1, tiled=True).reshape(16), None
    return jax.lax.scan(step, x, length=5)[0]

spec = P(("a", "b"))
f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
print(f.lower(jax.ShapeDtypeStruct((128,), jnp.float32)).compile().as_text())
"""


def test_collectives_count_as_often_as_their_loops_run():
    cost = hlo_cost.count_program_cost(output_of(PROGRAM, devices=8).decode())
    sent_bytes = {
        kind: sum(c.sent_bytes for c in cost.collectives if c.kind == kind)
        for kind in hlo_cost.COLLECTIVE_KINDS
    }
    size = 16 * 4  # bytes per device
    # On CPUs the psum_scatter may be an all-reduce of the full array.
    scatter_kind = "reduce-scatter" if sent_bytes["reduce-scatter"] else "all-reduce"
    scatter_bytes = 5 * 4 * size * 3 / 4 * (1 if scatter_kind == "reduce-scatter" else 2)
    expected = {
        "all-gather": 5 * 3 * size,
        "all-reduce": 5 * 2 * size * (2 - 1) / 2,
        "reduce-scatter": 0.0,
        "collective-permute": 15 * size,
        "all-to-all": 5 * size * 3 / 4,
    }
    expected[scatter_kind] += scatter_bytes
    assert sent_bytes == expected
    assert cost.unbounded_loops == 0
    all_reduce_groups = [c.groups for c in cost.collectives if c.kind == "all-reduce"]
    assert {0, 4} in [set(groups[0]) for groups in all_reduce_groups], (
        "a psum over axis a has groups such as devices 0 and 4"
    )


def test_matrix_products_in_a_loop_count_once_per_trip():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    arguments = (
        jax.ShapeDtypeStruct((64, 128), "float32"),
        jax.ShapeDtypeStruct((6, 128, 128), "float32"),
    )
    cost = hlo_cost.count_program_cost(jax.jit(f).lower(*arguments).compile().as_text() or "")
    assert cost.flops == 6 * 2 * 64 * 128 * 128
    # At least every weight, input and output of a trip once; at most a few copies of them.
    least = 4 * 6 * (128 * 128 + 2 * 64 * 128)
    assert least <= cost.traffic <= 3 * least


# A loop as XLA for TPUs writes it: without a trip count, and unrolled twice.
LOOP = """HloModule m, num_partitions=4

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %w = f32[16,16]{1,0} constant({...})
  %y = f32[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %z = f32[8,16]{1,0} all-reduce(%y), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%sum
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%next, %z)
}

%condition (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,16]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_loops_of_the_tpu_compiler_count_up_to_their_limit():
    cost = hlo_cost.count_program_cost(LOOP)
    assert cost.flops == 5 * 2 * 8 * 16 * 16
    assert cost.unbounded_loops == 0
    (collective,) = cost.collectives
    assert collective.sent_bytes == 5 * 2 * 8 * 16 * 4 / 2
    assert collective.groups.tolist() == [[0, 2], [1, 3]]


def test_loops_without_a_known_trip_count_are_reported():
    assert (
        hlo_cost.count_program_cost(LOOP.replace("direction=LT", "direction=NE")).unbounded_loops
        == 1
    )


# The first line of a slice in a fusion reads only the slice; an update in place writes only the
# update.
FUSION = """HloModule m

%fused (p: f32[100,8], q: f32[1,8], i: s32[]) -> f32[100,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %q = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %row = f32[1,8]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,8}
  %sum = f32[1,8]{1,0} add(%row, %q)
  ROOT %new = f32[100,8]{1,0} dynamic-update-slice(%p, %sum, %i, %i)
}

ENTRY %main (x: f32[100,8], y: f32[1,8], j: s32[]) -> f32[100,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %y = f32[1,8]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %out = f32[100,8]{1,0} fusion(%x, %y, %j), kind=kLoop, calls=%fused
}
"""


def test_a_fusion_that_updates_a_row_has_the_traffic_of_rows():
    row, index = 8 * 4, 4
    assert hlo_cost.count_program_cost(FUSION).traffic == row + row + index + row


@pytest.mark.parametrize(
    ("output", "image", "kernel", "attributes"),
    [
        # A product of 6×10 by 10×8 in three notations of XLA for TPUs: plain, with the columns as
        # positions, and batched.
        ((6, 8), (6, 10), (10, 8), "dim_labels=bf_io->bf"),
        (
            (6, 2, 4),
            (6, 10, 1),
            (10, 2, 4),
            "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
        ),
        (
            (3, 2, 8),
            (3, 2, 10),
            (3, 10, 8),
            "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
        ),
    ],
)
def test_convolutions_of_padding_count_as_matrix_products(output, image, kernel, attributes):
    flops = hlo_work._count_convolution_flops(output, image, kernel, attributes)
    assert flops == 2 * 6 * 10 * 8
