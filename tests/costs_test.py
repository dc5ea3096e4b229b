"""What costs.py reads from a program, against sums done by hand."""

import pytest

from dgpt_jax import costs
from dgpt_jax.hlo import Array, Program
from tests.paths import GOLDEN

# A loop of 5 rounds: a product of an operand in HBM and one on the chip, S(1), is written into a
# slice of a stacked buffer; then all devices add up a gradient.
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


def test_a_loop_counts_as_often_as_it_runs(program):
    assert program.times() == {"main": 1, "body": 5}
    assert costs.flops(program) == 5 * 2 * 16 * 128 * 256


def test_bytes_are_slices_and_what_is_in_hbm(program):
    in_the_loop = 16 * 128 * 2 + 16 * 256 * 4  # reads a, writes a row; b is on the chip
    fetch, result = 16 * 128 * 4, 16 * 128 * 4
    assert costs.bytes_moved(program) == 5 * in_the_loop + fetch + result


def test_collectives(program):
    (found,) = costs.collectives(program)
    assert (found.kind, found.group, found.count) == ("all-reduce", 4, 1)
    assert found.reach == 7  # 0, 2, 4 and 6
    assert found.bytes == 16 * 128 * 4 and found.wire_bytes == 2 * found.bytes * 3 / 4


@pytest.mark.parametrize(
    "groups,size,reach",
    [("{{0,1},{2,3}}", 2, 2), ("[2,4]<=[8]", 4, 4), ("[2,4]<=[4,2]T(1,0)", 4, 7),
     ("mesh['a'=2,'b'=8] {'b'}", 8, 8), ("mesh['a'=2,'b'=8] {'a'}", 2, 9)],
)  # fmt: skip
def test_groups(groups, size, reach):
    text = PROGRAM.replace("mesh['x'=2,'y'=4] {'x','y':(1)2}", groups)
    (found,) = costs.collectives(Program(text))
    assert (found.group, found.reach) == (size, reach)


def test_a_batched_product_is_not_counted_for_its_padding():
    """(3 · 4 heads, 10×8) @ (3 · 4, 8×10) as XLA's TPU compiler writes it: a convolution whose
    batch is spatial, dilated so that each image meets its own kernel only."""
    text = (GOLDEN / "batched.hlo").read_text()
    assert costs.flops(Program(text)) == 3 * 4 * 2 * 10 * 10 * 8


def test_a_loop_without_a_bound_is_refused():
    with pytest.raises(ValueError, match="does not count up"):
        Program(PROGRAM.replace("constant(5)", "parameter(1)")).times()
