"""What is taken for a hazard, on loops written here as Triton writes them."""

import sys
from pathlib import Path
from string import Template

import pytest

# `bench` is run from the repository and is not installed with the package.
sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.pipelines import follow

AHEAD = 2  # copies that begin before the loop does

BEGIN = """
#loc = loc(unknown)
#shared = #ttg.nvmma_shared<{swizzlingByteWidth = 128}>
module attributes {"ttg.num-warps" = 4 : i32} {
tt.func public @kernel(%source: tensor<64x!tt.ptr<bf16>> loc("source"(#loc)), %depth: i32) {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c-1 = arith.constant -1 : i32
  %c64_i32 = arith.constant 64 : i32
  %true = arith.constant true
  %slots = arith.constant $slots : i32
  %zero = arith.constant dense<0.000000e+00> : tensor<64x64xf32, #mma>
  %turns = arith.divsi %depth, %c64_i32 : i32
  %tiles = ttg.local_alloc : () -> !ttg.memdesc<${slots}x64x64xbf16, #shared, mutable> loc(#loc3)
"""
END = """
  tt.return
}
}
"""


def copy(index):
    return f"""
  %to = ttg.memdesc_index %tiles[{index}] : !ttg.memdesc<> -> !ttg.memdesc<> loc(#loc3)
  %copied = ttg.async_copy_global_to_local %source, %to mask %m : tensor<> -> <> loc(#loc3)
  %group = ttg.async_commit_group tokens %copied loc(callsite(#loc1 at #loc2))
"""


def following(slot):
    return f"""
  %{slot}_more = arith.addi %{slot}, %c1 : i32 loc(#loc)
  %{slot}_past = arith.cmpi sge, %{slot}_more, %slots : i32
  %{slot}_1 = arith.select %{slot}_past, %c0, %{slot}_more : i32
"""


WGMMA = Template(
    BEGIN
    + copy("%c0")
    + copy("%c1")
    + """
  %out:3 = scf.for %i = %c0 to %turns step %c1 iter_args(%sum = %zero, %put = %c1, %get = %c-1)\
 -> (tensor<64x64xf32, #mma>, i32, i32) : i32 {
"""
    + following("get")
    + """
  %ready = ttg.async_wait %group {num = $waits : i32}
  %tile = ttg.memdesc_index %tiles[%get_1] : !ttg.memdesc<> -> !ttg.memdesc<>
  %turned = ttg.memdesc_trans %tile {order = array<i32: 1, 0>} : !ttg.memdesc<> -> !ttg.memdesc<>
  %dot = ttng.warp_group_dot %tile, %turned, %sum {isAsync = $is_async} : !ttg.memdesc<>
  %done:2 = ttng.warp_group_dot_wait %dot, %tile {pendings = $pendings : i32} : !ttg.memdesc<>
"""
    + following("put")
    + copy("%put_1")
    + """
  scf.yield %done#0, %put_1, %get_1 : tensor<64x64xf32, #mma>, i32, i32
  } loc(#loc)
  %end = ttng.warp_group_dot_wait %out#0 {pendings = $left : i32} : tensor<64x64xf32, #mma>
  %all = ttg.async_wait {num = 0 : i32}
  ttg.local_dealloc %tiles : !ttg.memdesc<>
"""
    + END
)


def wgmma(turns=9, slots=3, waits=1, pendings=1, left=0, is_async="true"):
    """The product of a turn may be pending until the next one."""
    text = WGMMA.substitute(
        slots=slots, waits=waits, pendings=pendings, left=left, is_async=is_async
    )
    return follow(text, depth=64 * turns)


@pytest.mark.parametrize("turns", range(9))
@pytest.mark.parametrize("slots", [3, 4])
def test_a_slot_for_each_copy_ahead_and_one_for_the_pending_product(slots, turns):
    course = wgmma(turns, slots)
    assert not course.hazards
    assert course.copies == AHEAD + turns
    assert course.overlapping == turns


@pytest.mark.parametrize("turns", [1, 9])
def test_a_slot_too_few_is_copied_to_while_a_product_reads_it(turns):
    course = wgmma(turns, slots=2)
    assert "%tiles[0] is copied to while a product of it is pending" in course.hazards
    assert len(course.hazards) == min(turns, 2)


def test_products_that_are_waited_for_need_no_slot_of_their_own():
    assert not wgmma(slots=2, pendings=0).hazards
    assert not wgmma(slots=2, is_async="false").hazards
    assert not wgmma(slots=4, pendings=2).hazards
    assert wgmma(slots=3, pendings=2).hazards


def test_a_product_that_does_not_wait_for_its_copy_is_a_hazard():
    assert not wgmma(waits=0).hazards
    assert "%tiles[1] is read while a copy into it is pending" in wgmma(waits=2).hazards


def test_memory_that_is_given_up_under_a_product_is_a_hazard():
    (hazard,) = wgmma(left=1).hazards
    assert hazard == "%tiles is given up while a product of it is pending"


# A product begins ahead of the loop; that of a turn is waited for in the next, or behind the loop.
TCGEN05 = Template(
    BEGIN
    + copy("%c0")
    + copy("%c1")
    + """
  %bars = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared, mutable>
  %bar0 = ttg.memdesc_index %bars[%c0] : !ttg.memdesc<> -> !ttg.memdesc<>
  ttng.init_barrier %bar0, 1 : !ttg.memdesc<>
  %bar1 = ttg.memdesc_index %bars[%c1] : !ttg.memdesc<> -> !ttg.memdesc<>
  ttng.init_barrier %bar1, 1 : !ttg.memdesc<>
  %low = ttng.tmem_alloc : () -> !ttg.memdesc<64x64xf32, #tmem, mutable>
  ttng.tmem_store %zero, %low, %true : tensor<64x64xf32> -> !ttg.memdesc<>
  %any = arith.cmpi sgt, %turns, %c0 : i32
  %ready = ttg.async_wait %group {num = 1 : i32}
  %tile = ttg.memdesc_index %tiles[%c0] : !ttg.memdesc<> -> !ttg.memdesc<>
  ttng.tc_gen5_mma %tile, %tile, %low[], %true, %any, %bar0[%true] {is_async} : !ttg.memdesc<>
"""
    + copy("%c$third")
    + """
  %rest = arith.subi %turns, %c1 : i32
  %out:6 = scf.for %i = %c0 to %rest step %c1 iter_args(%put = %c$third, %get = %c0, %bar = %c1,\
 %phase = %c0, %last = %bar0, %last_phase = %c0) -> (i32, i32, i32, i32, !ttg.memdesc<>, i32) {
"""
    + following("get")
    + """
  %ready_1 = ttg.async_wait %group {num = 1 : i32}
  %tile_1 = ttg.memdesc_index %tiles[%get_1] : !ttg.memdesc<> -> !ttg.memdesc<>
  %own = ttg.memdesc_index %bars[%bar] : !ttg.memdesc<> -> !ttg.memdesc<>
  ttng.tc_gen5_mma %tile_1, %tile_1, %low[], %true, %true, %own[%true] {is_async} : !ttg.memdesc<>
  ttng.wait_barrier %last, $phase deps %tile_1 : !ttg.memdesc<>
  %bar_1 = arith.xori %bar, %c1 : i32
  %wraps = arith.cmpi eq, %bar_1, %c0 : i32
  %flipped = arith.xori %phase, %c1 : i32
  %phase_1 = arith.select %wraps, %flipped, %phase : i32
"""
    + following("put")
    + copy("%put_1")
    + """
  scf.yield %put_1, %get_1, %bar_1, %phase_1, %own, %phase : i32, i32, i32, i32, !ttg.memdesc<>, i32
  }
  scf.if %any {
    $last_wait
  } else {
  }
  %all = ttg.async_wait {num = 0 : i32}
  %result = ttng.tmem_load %low : !ttg.memdesc<> -> tensor<64x64xf32>
  ttg.local_dealloc %tiles : !ttg.memdesc<>
"""
    + END
)
LAST_WAIT = "ttng.wait_barrier %out#4, %out#5 deps %tile : !ttg.memdesc<>"


def tcgen05(turns=9, slots=3, phase="%last_phase", last_wait=LAST_WAIT):
    text = TCGEN05.substitute(slots=slots, third=2 % slots, phase=phase, last_wait=last_wait)
    return follow(text, depth=64 * turns)


@pytest.mark.parametrize("turns", range(9))
def test_a_barrier_ends_the_products_up_to_its_own(turns):
    course = tcgen05(turns)
    assert not course.hazards
    assert course.overlapping == turns


def test_a_slot_too_few_is_a_hazard_on_sm_100_too():
    hazards = tcgen05(slots=2).hazards
    assert "%tiles[0] is copied to while a product of it is pending" in hazards


def test_a_barrier_that_was_passed_before_ends_nothing():
    assert tcgen05(phase="%c1").hazards


def test_a_sum_that_is_read_too_early_is_a_hazard():
    assert "%low is read while a product into it is pending" in tcgen05(last_wait="").hazards


HIDDEN = {
    "a branch": "%first = tt.get_program_id x : i32\n"
    "%here = arith.cmpi ne, %first, %c0 : i32\n"
    "scf.if %here {\n$copy\n}",
    "a loop": "%first = tt.get_program_id x : i32\n"
    "%end = arith.minsi %depth, %first : i32\n"
    "scf.for %i = %c0 to %end step %c1 : i32 {\n$copy\n}",
}


@pytest.mark.parametrize("where", HIDDEN)
def test_copies_that_only_other_programs_reach_are_told(where):
    course = follow(begin() + Template(HIDDEN[where]).substitute(copy=copy("%c0")) + END, depth=64)
    (missed,) = course.missed
    assert missed.startswith("ttg.async_copy_global_to_local in line ")
    assert not follow(begin() + copy("%c0") + END).missed


@pytest.mark.parametrize("turns", range(3))
def test_what_a_loop_without_a_turn_leaves_out_is_missed_there(turns):
    assert len(wgmma(turns).missed) == (0 if turns else 2)


@pytest.mark.parametrize(
    ("condition", "value"),
    [
        ("arith.cmpi ugt, %depth, %c64_i32 : i32", {64: False, 65: True, -1: True}),
        ("arith.cmpi ule, %depth, %c64_i32 : i32", {64: True, 65: False, -1: False}),
        ("arith.shrsi %depth, %c2 : i32", {3: False, 4: True}),
        ("arith.shli %depth, %c2 : i32", {0: False, 1: True}),
    ],
)
def test_integers_are_those_of_triton(condition, value):
    text = begin() + f"%x = {condition}\nscf.if %x {{{copy('%c0')}}}" + END
    for depth, expected in value.items():
        assert follow(text, depth=depth).copies == expected


def begin():
    return Template(BEGIN).substitute(slots=3)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("%x = ttng.unheard_of %tiles : !ttg.memdesc<3x64xbf16>", "unheard_of"),
        ("ttng.async_tma_copy_global_to_local %source, %tiles", "async_tma_copy"),
        ("ttng.wait_barrier %elsewhere, %c0", "where %elsewhere is"),
        ("%x = arith.cmpi near, %c0, %c1 : i32", "cannot compare by near"),
        ("ttng.wait_barrier %tiles, %c0", "has made the barrier"),
        ("ttg.async_wait %group", "cannot tell num"),
        ("scf.if %unknown {\nttg.local_dealloc %tiles : !ttg.memdesc<3x64xbf16>\n}", "scf.if"),
        (
            "scf.for %i = %c0 to %unknown step %c1 {\n"
            "ttg.local_dealloc %tiles : !ttg.memdesc<3x64xbf16>\n}",
            "scf.for",
        ),
    ],
)
def test_what_cannot_be_followed_is_an_error(line, why):
    with pytest.raises(ValueError, match=why):
        follow(begin() + line + END)


def test_what_has_no_shared_memory_may_be_unknown():
    text = """
  %p = tt.load %address : tensor<64x!tt.ptr<f32>>
  %r = "tt.reduce"(%p) <{axis = 0 : i32}> ({
  ^bb0(%a: f32 loc(unknown), %b: f32 loc(unknown)):
    %s = arith.addf %a, %b : f32
    tt.reduce.return %s : f32
  }) : (tensor<64xf32>) -> f32
  %x = scf.if %unknown -> (i32) {
    scf.yield %c0 : i32
  } else {
    scf.yield %c1 : i32
  }
"""
    assert not follow(begin() + text + END).hazards
