"""Every notation of optimized HLO, by a sample line."""

import pytest

from radiance.planning import hlo_text

COMPUTATIONS = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %x)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(11)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
"""


def test_an_instruction_has_operands_and_attributes():
    computations, entry = hlo_text.parse_hlo(COMPUTATIONS.replace("%condition", "ENTRY %main"))
    assert entry == "main"
    assert [*computations] == ["body", "main"]
    next_counter = computations["body"]["next"]
    assert next_counter.op == "add"
    assert next_counter.operands == ["i", "two"]
    assert hlo_text.find_root(computations["body"]).name == "t"
    assert computations["body"]["x"].attribute("index") == "1"
    with pytest.raises(ValueError, match="Instruction next of the compiled program has no index"):
        next_counter.attribute("index")


@pytest.mark.parametrize(
    ("hlo_type", "size"),
    [
        ("f32[8,16]{1,0}", 512),
        ("bf16[]", 2),
        ("(pred[3], s4[6], f8e4m3fn[5])", 3 + 3 + 5),
        ("f32[8]{0:S(1)}", 32),
    ],
)
def test_byte_size(hlo_type, size):
    assert hlo_text.byte_size(hlo_type) == size


def test_arrays_on_the_chip_are_not_in_main_memory():
    assert hlo_text.byte_size("(f32[8]{0:S(1)}, f32[2]{0})", main_memory_only=True) == 8


def test_known_trip_count():
    attributes = ', body=%b, backend_config={"known_trip_count":{"n":"5"}}'
    assert hlo_text.parse_known_trip_count(attributes) == 5
    assert hlo_text.parse_known_trip_count(", body=%b") is None


@pytest.mark.parametrize(
    ("line", "changed_line", "trips"),
    [
        ("add(%i, %two)", "add(%i, %two)", 6),  # the last trip starts at 10
        ("add(%i, %two)", "add(%i, %i)", 11),
        ("direction=LT", "direction=NE", None),
        ("compare(%i, %limit)", "compare(%limit, %i)", None),
    ],
)
def test_loop_that_counts_from_zero(line, changed_line, trips):
    computations, _ = hlo_text.parse_hlo(COMPUTATIONS.replace(line, changed_line))
    assert hlo_text.parse_counted_loop(computations["condition"], computations["body"]) == trips


@pytest.mark.parametrize(
    ("parse", "attributes", "groups"),
    [
        (hlo_text.parse_listed_groups, "replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        (hlo_text.parse_iota_groups, "replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        (hlo_text.parse_iota_groups, "replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        (hlo_text.parse_mesh_groups, "replica_groups=mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
        (hlo_text.parse_mesh_groups, "replica_groups=mesh['x'=4] {'x':(2)2}", [[0, 1], [2, 3]]),
        (
            hlo_text.parse_mesh_groups,
            "replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}",
            [[0, 1], [2, 3]],
        ),
        (
            hlo_text.parse_mesh_groups,
            "replica_groups=mesh['x'=2,'y'=2], device_ids=(0,3,1,2) {'y'}",
            [[0, 3], [1, 2]],
        ),
        (hlo_text.parse_device_pairs, "source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_device_groups(parse, attributes, groups):
    line = f", {attributes}, dimensions={{0}}"
    assert parse(line).tolist() == groups
    assert hlo_text.parse_device_groups(line, 4).tolist() == groups


@pytest.mark.parametrize("attributes", ["replica_groups={}", "channel_id=1"])
def test_all_devices_are_the_group_by_default(attributes):
    assert hlo_text.parse_device_groups(f", {attributes}", 4).tolist() == [[0, 1, 2, 3]]


def test_an_unknown_notation_is_an_error():
    with pytest.raises(ValueError, match="Device groups in an unknown notation"):
        hlo_text.parse_device_groups(", replica_groups=<0,1>", 4)
