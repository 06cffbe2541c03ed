"""Times of kernels against closed forms."""

import jax
import jax.numpy as jnp
import pytest

from radiance.distributed.hardware import DEVICE_SPECS
from radiance.planning.hlo_cost import count_program_cost
from radiance.planning.kernel_times import (
    DeviceRates,
    count_compute_seconds,
    format_kernel_times,
    get_device_rates,
    time_kernels,
)

# One byte and one elementwise operation take a second; a bfloat16 product is 1000 times as fast,
# a float32 product 10 times.
RATES = DeviceRates({"": 1000.0, "f32": 10.0}, 1.0, 1.0, is_measured=True)

# A loop of three trips, each with an asynchronous slice of a stack of weights, a product of 8×16 by
# 16×32 with workspace, a copy of every second column and eight exponentials of one number.
PROGRAM = """HloModule m

FileNames
1 "/somewhere/radiance/model/blocks.py"
2 "/elsewhere/linear.py"

FunctionNames
1 "layer_norm"

FileLocations
1 {file_name_id=1 function_name_id=1 line=28 end_line=28 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%slice (p: bf16[3,16,32], i: s32[]) -> bf16[1,16,32] {
  %p = bf16[3,16,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %weights = bf16[1,16,32]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={}
}

%columns (y: bf16[8,32]) -> bf16[8,16,1] {
  %y = bf16[8,32]{1,0} parameter(0)
  %pairs = bf16[8,16,2]{2,1,0} bitcast(%y)
  %double = bf16[8,16,2]{2,1,0} add(%pairs, %pairs)
  ROOT %even = bf16[8,16,1]{2,1,0} slice(%double), slice={[0:8], [0:16], [0:1]}
}

%exponentials (a: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] exponential(%a)
  %c = f32[] exponential(%b)
  %d = f32[] exponential(%c)
  %e = f32[] exponential(%d)
  %f = f32[] exponential(%e)
  %g = f32[] exponential(%f)
  %h = f32[] exponential(%g)
  %j = f32[] exponential(%h)
  ROOT %k = f32[] exponential(%j)
}

%body (t: (s32[], bf16[8,16], bf16[3,16,32], f32[])) -> (s32[], bf16[8,16], bf16[3,16,32], f32[]) {
  %t = (s32[], bf16[8,16]{1,0}, bf16[3,16,32]{2,1,0}, f32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%t), index=1
  %stack = bf16[3,16,32]{2,1,0} get-tuple-element(%t), index=2
  %a = f32[] get-tuple-element(%t), index=3
  %fusion-start.1 = ((bf16[3,16,32]{2,1,0}, s32[]), bf16[1,16,32]{2,1,0}, u32[]) \
fusion-start(%stack, %i), kind=kLoop, calls=%slice
  %fusion-done.1 = bf16[1,16,32]{2,1,0} fusion-done(%fusion-start.1)
  %w = bf16[16,32]{1,0} bitcast(%fusion-done.1)
  %product.4 = (bf16[8,32]{1,0}, s8[100000]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/dot_general"}, \
backend_config={"lhs_contracting_dimensions":["1"]}
  %y = bf16[8,32]{1,0} get-tuple-element(%product.4), index=0
  %column_fusion.2 = bf16[8,16,1]{2,1,0} fusion(%y), kind=kLoop, calls=%columns, \
metadata={op_name="jit(f)/slice" stack_frame_id=2}
  %new_x = bf16[8,16]{1,0} bitcast(%column_fusion.2)
  %exponential_fusion = f32[] fusion(%a), kind=kLoop, calls=%exponentials
  ROOT %new = (s32[], bf16[8,16]{1,0}, bf16[3,16,32]{2,1,0}, f32[]) \
tuple(%i, %new_x, %stack, %exponential_fusion)
}

ENTRY %main (t: (s32[], bf16[8,16], bf16[3,16,32], f32[])) -> (s32[], bf16[8,16], bf16[3,16,32], f32[]) {
  %t = (s32[], bf16[8,16]{1,0}, bf16[3,16,32]{2,1,0}, f32[]) parameter(0)
  ROOT %loop = (s32[], bf16[8,16]{1,0}, bf16[3,16,32]{2,1,0}, f32[]) while(%t), \
condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


# A product of float8, with its scales, as XLA for NVIDIA GPUs writes it, and one of bfloat16.
FLOAT8_PROGRAM = """HloModule m

ENTRY %main (x: f8e5m2[8,16], w: f8e4m3fn[32,16], s: f32[], y: bf16[8,16]) -> bf16[8,32] {
  %x = f8e5m2[8,16]{1,0} parameter(0)
  %w = f8e4m3fn[32,16]{1,0} parameter(1)
  %s = f32[] parameter(2)
  %y = bf16[8,16]{1,0} parameter(3)
  %v = bf16[32,16]{1,0} parameter(4)
  %float8.1 = (bf16[8,32]{1,0}, s8[64]{0}) custom-call(%x, %w, %s, %s), \
custom_call_target="__cublas$lt$matmul$f8", backend_config={"lhs_contracting_dimensions":["1"]}
  %bfloat16.1 = (bf16[8,32]{1,0}, s8[64]{0}) custom-call(%y, %v), \
custom_call_target="__cublas$lt$matmul", backend_config={"lhs_contracting_dimensions":["1"]}
  ROOT %product = bf16[8,32]{1,0} get-tuple-element(%float8.1), index=0
}
"""


def test_products_of_float8_have_their_own_rate():
    rates = DeviceRates({"": 1.0, "f8e5m2": 4.0}, 1e9, 0, is_measured=True)
    cost, flops = count_program_cost(FLOAT8_PROGRAM), 2 * 8 * 16 * 32
    seconds = {k.name: k.seconds for k in time_kernels(FLOAT8_PROGRAM, cost, rates).kernels}
    assert seconds == {"float8": pytest.approx(flops / 4), "bfloat16": pytest.approx(flops)}
    # Values of one byte, two scales, and the result.
    assert cost.kernels[0].traffic == 8 * 16 + 32 * 16 + 2 * 4 + 2 * 8 * 32
    h200, a100 = DEVICE_SPECS["NVIDIA H200"], DEVICE_SPECS["NVIDIA A100"]
    assert count_compute_seconds(cost, h200) == pytest.approx(flops * (1 / 989e12 + 1 / 1979e12))
    assert count_compute_seconds(cost, a100) == pytest.approx(2 * flops / 312e12)


def test_kernels_take_the_longest_of_their_times_in_every_trip():
    times = time_kernels(PROGRAM, count_program_cost(PROGRAM), RATES)
    product, columns, exponentials = times.kernels
    assert (product.name, product.source, product.bound) == ("product", "dot_general", "memory")
    assert product.traffic == 2 * (8 * 16 + 16 * 32 + 8 * 32)
    assert product.product_seconds == pytest.approx(3 * 2 * 8 * 16 * 32 / 1000)
    # A slice of every second number reads all sectors.
    assert (columns.name, columns.source) == ("column_fusion", "model/blocks.py:28")
    assert (columns.num_runs, columns.seconds) == (3, 3 * 2 * (8 * 32 + 8 * 16))
    assert (exponentials.bound, exponentials.seconds) == ("elementwise", 3 * 9)
    assert times.seconds == product.seconds + columns.seconds + exponentials.seconds
    # The weights are read from the stack and written, beside the other kernels.
    assert times.async_seconds == 3 * (2 * 2 * 16 * 32 + 4)


def test_the_table_names_the_share_of_the_products():
    fast_memory = RATES._replace(memory_bandwidth=1e9, elementwise_per_second=0)
    times = time_kernels(PROGRAM, count_program_cost(PROGRAM), fast_memory)
    product_seconds = 3 * 2 * 8 * 16 * 32 / 1000
    assert times.seconds == pytest.approx(product_seconds, rel=1e-4)
    text = format_kernel_times(times, fast_memory, model_flops=1000 * product_seconds / 2)
    assert "take 50% of this time" in text
    assert "model/blocks.py:28" in text


def test_times_of_a_compiled_loop():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((64, 128), (6, 128, 128))]
    text = jax.jit(f).lower(*shapes).compile().as_text() or ""
    times = time_kernels(text, count_program_cost(text), RATES._replace(memory_bandwidth=1e12))
    product_seconds = 6 * 2 * 64 * 128 * 128 / 10
    assert times.seconds - times.seconds_beyond_products == pytest.approx(product_seconds)
    # Beyond the products: at least one tanh for each number.
    assert 6 * 64 * 128 <= times.seconds_beyond_products <= 6 * 64 * 128 * 3


def test_rates_are_measured_or_of_the_data_sheet():
    h200, v5p = get_device_rates("NVIDIA H200"), get_device_rates("TPU v5")
    assert h200.is_measured
    assert h200.product_flops_per_second[""] == 790e12
    # Float8 is assumed to reach as much of its data sheet as bfloat16.
    assert h200.product_flops_per_second["f8e4m3fn"] == pytest.approx(1979e12 * 790 / 989)
    assert v5p.product_flops_per_second["f8e4m3fn"] == 459e12  # has none
    assert not v5p.is_measured
    assert v5p.product_flops_per_second["f32"] == 459e12 / 6
    assert v5p.elementwise_per_second == 0
