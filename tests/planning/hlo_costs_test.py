"""Costs of a program against sums by hand."""

import pytest

from dgpt_jax.planning import hlo_costs
from dgpt_jax.planning.hlo import Array, Program
from tests.support.paths import GOLDEN

# A loop of 5 iterations writes the product of operands in HBM and on-chip memory, S(1), to a slice
# of a stacked buffer; then a gradient is all-reduced.
PROGRAM = (GOLDEN / "loop.hlo").read_text()


@pytest.fixture
def program():
    return Program(PROGRAM)


def test_tiles_pad_arrays():
    assert Array("f32", (10, 100), "1,0:T(8,128)").bytes == 16 * 128 * 4
    assert Array("f32", (10, 100), "0,1:T(8,128)").bytes == 104 * 128 * 4
    assert Array("bf16", (3, 148, 32), "2,1,0:T(8,128)(2,1)").bytes == 3 * 152 * 128 * 2
    assert Array("f32", (), ":T(128)").bytes == 4
    assert not Array("f32", (8, 128), "1,0:T(8,128)S(1)").in_hbm


def test_a_loop_counts_every_iteration(program):
    assert program.execution_counts() == {"main": 1, "body": 5}
    assert hlo_costs.flops(program) == 5 * 2 * 16 * 128 * 256


def test_bytes_count_slices_and_arrays_in_hbm(program):
    in_loop = 16 * 128 * 2 + 16 * 256 * 4  # reads a, writes a row; b is in on-chip memory
    fetch, result = 16 * 128 * 4, 16 * 128 * 4
    assert hlo_costs.bytes_moved(program) == 5 * in_loop + fetch + result


def test_collectives(program):
    (collective,) = hlo_costs.collectives(program)
    assert (collective.kind, collective.group, collective.count) == ("all-reduce", 4, 1)
    assert not collective.dcn
    assert collective.bytes == 16 * 128 * 4
    assert collective.wire_bytes == 2 * collective.bytes * 3 / 4


@pytest.mark.parametrize(
    "groups,size",
    [("{{0,1},{2,3}}", 2), ("[2,4]<=[8]", 4), ("[4,2]<=[2,4]T(1,0)", 2),
     ("mesh['a'=2,'b'=8] {'b'}", 8)],
)  # fmt: skip
def test_group_sizes(groups, size):
    text = PROGRAM.replace("mesh['x'=2,'y'=4] {'x','y':(1)2}", groups)
    assert hlo_costs.collectives(Program(text))[0].group == size


@pytest.mark.parametrize("channels,count", [((7, 7), 1), ((7, 8), 2)])
def test_a_reduce_scatter_is_a_named_fusion_and_counts_once(channels, count):
    """Clones of a collective in two fusions share a channel."""
    fused, calls = "", ""
    for i, channel in enumerate(channels):
        fused += f"""%all-reduce-scatter.{i} (p: f32[16,128]) -> f32[4,128] {{
  %p = f32[16,128]{{1,0:T(8,128)}} parameter(0)
  %sum = f32[16,128]{{1,0:T(8,128)}} all-reduce(%p), channel_id={channel}, replica_groups=[2,4]<=[8]
  ROOT %part = f32[4,128]{{1,0:T(4,128)}} slice(%sum), slice={{[0:4], [0:128]}}
}}
"""
        calls += f"""  %part.{i} = f32[4,128]{{1,0:T(4,128)}} fusion(%whole), kind=kCustom, \
calls=%all-reduce-scatter.{i}
"""
    text = PROGRAM.replace("ENTRY", f"{fused}ENTRY").replace("  ROOT %all", f"{calls}  ROOT %all")
    text = text.replace(
        "  %fetch =", "  %whole = f32[16,128]{1,0:T(8,128)} broadcast(%g)\n  %fetch ="
    )
    by_kind = {c.kind: c for c in hlo_costs.collectives(Program(text.replace("\\\n", "")))}
    assert by_kind["reduce-scatter"].count == count
    assert by_kind["reduce-scatter"].wire_bytes == count * 16 * 128 * 4 * 3 / 4


def test_transfers_between_slices():
    """libtpu's runtime reduces the arrays that four slices send to their hosts."""
    sent = """  %token = token[] after-all()
  %send = (bf16[28,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%shard, %token), \
channel_id=3, frontend_attributes={_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1,2,3,4}x{0:255}"}
  %shard = bf16[28,8,128]{2,1,0:T(8,128)(2,1)} broadcast(%g)
""".replace("\\\n", "")
    (collective, _) = hlo_costs.collectives(
        Program(PROGRAM.replace("  ROOT %all", f"{sent}  ROOT %all"))
    )
    assert (collective.kind, collective.group, collective.dcn) == ("all-reduce", 4, True)
    assert collective.bytes == 28 * 8 * 128 * 2


def test_padding_of_a_batched_product_does_not_count():
    """(3 · 4 heads, 10×8) @ (3 · 4, 8×10) as compiled by XLA for TPUs: a convolution with the batch
    as a spatial axis, dilated so that each image reads only its own kernel."""
    text = (GOLDEN / "batched.hlo").read_text()
    assert hlo_costs.flops(Program(text)) == 3 * 4 * 2 * 10 * 10 * 8


def test_a_loop_without_a_bound_is_refused():
    with pytest.raises(ValueError, match="loop .* constant"):
        Program(PROGRAM.replace("constant(5)", "parameter(1)")).execution_counts()
