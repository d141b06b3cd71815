"""The predictor reads compiled facts right, and its arithmetic goes the way of the hardware."""

import json
from dataclasses import asdict, replace

import pytest

from bench import predict
from bench.cases import Case
from bench.predict import Facts, Rates, Work, facts_of, floor, seconds, totals, work_of

RATES = Rates()
FACTS = Facts(8, 128, 80 * 1024, 4, 64, asynchronous=True, from_registers=False)
WORK = Work(
    "128 x 128 x 64", 264, 2.0 * 128 * 128 * 4096, 2 * 256 * 4096, 0, 393216, 0, 64, 32768, 3
)
CASE = Case(4096, 4096, 1024, "bf16", "fira", 1)

CODE = """
        /*0100*/  LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0110*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0120*/  LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0130*/  LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;
        /*0140*/  STG.E.128 desc[UR4][R2.64], R4 ;
        /*0150*/  STG.E.64 desc[UR4][R2.64+0x10], R4 ;
        /*0160*/  LDG.E R4, desc[UR4][R2.64] ;
        /*0170*/  STG.E desc[UR4][R2.64], R4 ;
"""
TTGIR = """
    %a = ttg.local_alloc : () -> !ttg.memdesc<3x128x64xbf16, #shared>
    %b = ttg.local_alloc : () -> !ttg.memdesc<3x64x256xbf16, #shared>
    %d = ttng.warp_group_dot {}, %y, %z {{inputPrecision = 0 : i32}} : {} * !ttg.memdesc -> tensor
"""


def test_facts_are_read():
    """Loads behind a store are a round of their own; those before the last product are none."""
    text = TTGIR.format("%x", "!ttg.memdesc<128x64xbf16,#shared>")
    facts = facts_of(CODE, "REG:181 STACK:0", text, shared=4096, warps=8)
    assert facts == Facts(8, 181, 4096, 2, 18, asynchronous=True, from_registers=False)
    registers = TTGIR.format("%x", "tensor<128x64xbf16,#dot>")
    assert facts_of(CODE, "REG:9", registers, 0, 4).from_registers
    assert not facts_of(CODE, "REG:9", "", 0, 4).asynchronous


@pytest.mark.parametrize(
    ("facts", "blocks"),
    [
        (FACTS, 2),
        (FACTS._replace(registers=129), 1),
        (FACTS._replace(shared=113 * 1024), 2),
        (FACTS._replace(shared=114 * 1024), 1),
        (FACTS._replace(warps=4, shared=0), 4),
        (FACTS._replace(warps=4, registers=16, shared=0), 16),
    ],
)
def test_blocks_of_a_processor(facts, blocks):
    assert facts.blocks(RATES) == blocks


def test_one_block_more_is_a_wave_more():
    times = [seconds(WORK._replace(blocks=n), FACTS, RATES) for n in (132, 264, 265, 528)]
    assert times == sorted(times)
    assert times[2] - times[1] > 0.4 * times[0]
    # Two blocks a processor share its tensor cores; they hide each other's epilogues.
    assert times[0] < times[1] < 2 * times[0]


@pytest.mark.parametrize(
    ("work", "facts"),
    [
        (WORK, FACTS._replace(rounds=64)),
        (WORK, FACTS._replace(asynchronous=False)),
        (WORK._replace(loop_bytes=4 * WORK.loop_bytes), FACTS),
        (WORK._replace(epilogue_bytes=4 * WORK.epilogue_bytes), FACTS),
        (WORK._replace(step_bytes=2048), FACTS),
        (WORK, FACTS._replace(registers=255)),
        (WORK._replace(total_bytes=1e9), FACTS),
        (WORK._replace(trips=1000), FACTS),
    ],
)
def test_what_costs_time(work, facts):
    if facts.registers == 255:
        work = work._replace(blocks=4 * work.blocks)
        assert seconds(work, facts, RATES) > seconds(work, FACTS, RATES)
    else:
        if work.step_bytes != WORK.step_bytes:
            work = work._replace(steps=16 * WORK.steps)
        assert seconds(work, facts, RATES) > seconds(WORK, FACTS, RATES)


def launched(**options):
    return {"BC": 128, "BR": 64, "BD": 256, "num_stages": 3, "parts": 1, **options}


def test_no_kernel_is_faster_than_its_floor():
    """On a machine without losses a kernel of many blocks comes near it."""
    ideal = Rates(l2=1e15, l2_of_one=1e14, round_trip=0, fill=0, launch=0, hidden=1)
    ideal = replace(ideal, streaming=1, product=1, product_from_registers=1)
    for kernel in ("project_kernel", "update_kernel"):
        for one in (CASE, replace(CASE, rank=64, matrices=33)):
            work = work_of(kernel, one, launched(BD=128))
            for rates in (RATES, ideal):
                assert seconds(work, FACTS, rates) >= 0.99 * floor(one, kernel, RATES)
    many = replace(CASE, matrices=33)
    work = work_of("update_kernel", many, launched(BD=128))
    assert seconds(work, FACTS, ideal) <= 1.2 * floor(many, "update_kernel", RATES)


def test_bytes_and_flops_of_all_blocks_are_those_of_the_operation():
    for kernel, operation in predict._OPERATIONS.items():
        work = work_of(kernel, CASE, launched(BC=128, BD=128))
        moved, flops = CASE.traffic()[operation]
        assert work.blocks * work.flops == flops
        assert work.total_bytes == moved
    # 128 x 256 from float32 N and R: 2 * 128 * 256 / (8 * 128 + 2 * 256).
    assert work_of("update_kernel", CASE, launched()).flops_a_byte == pytest.approx(42.7, abs=0.1)


def test_the_committed_record_says_what_it_is_and_is_no_better_than_the_floor():
    record = json.loads(predict.RESULT.read_text())
    assert record["note"] == predict.TITLE
    assert record["rates"] == asdict(RATES)
    assert predict.TITLE in predict.RESULT.with_suffix(".txt").read_text()
    assert record["rows"]
    for row in record["rows"]:
        assert row["us"] >= row["floor_us"], row
    for milliseconds, least in totals(record["rows"]).values():
        assert milliseconds > least


def test_versions_stand_side_by_side():
    row = {"model": "1b", "count": 10, "us": 30.0, "floor_us": 10.0}
    rows = [{**row, "version": "before"}, {**row, "version": "now", "us": 20.0}] * 2
    assert totals(rows) == {("before", "1b"): (0.6, 0.2), ("now", "1b"): (0.4, 0.2)}
    text = predict.totals_table(rows)
    assert [column.header for column in text.columns][2:] == [
        "before ms (x floor)",
        "now ms (x floor)",
    ]
