"""The predictor reads compiled facts right, and its arithmetic goes the way of the hardware."""

import json
from dataclasses import asdict, replace

import pytest

pytest.importorskip("triton")
from bench import predict
from bench.cases import Case
from bench.predict import Facts, facts_of, floor, totals, work_of
from lowrank_kernels.ops import times
from lowrank_kernels.ops.triton.model import RATES, Rates, Work, resident, seconds

FACTS = Facts(8, 128, 80 * 1024, 4, 64, asynchronous=True, from_registers=False)
BUILD = FACTS.build
WORK = Work(264, 2.0 * 128 * 128 * 4096, 2 * 256 * 4096, 0, 393216, 0, 64, 32768, 3)
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
    ("registers", "warps", "kilobytes", "blocks"),
    [(128, 8, 80, 2), (129, 8, 80, 1), (128, 8, 113, 2), (128, 8, 114, 1), (128, 4, 0, 4),
     (16, 4, 0, 16), (255, 8, 227, 1)],
)  # fmt: skip
def test_blocks_of_a_processor(registers, warps, kilobytes, blocks):
    assert resident(registers, warps, kilobytes * 1024) == blocks


def test_one_block_more_is_a_wave_more():
    times = [seconds(WORK._replace(blocks=n), BUILD) for n in (132, 264, 265, 528)]
    assert times == sorted(times)
    assert times[2] - times[1] > 0.4 * times[0]
    # Two blocks a processor share its tensor cores; they hide each other's epilogues.
    assert times[0] < times[1] < 2 * times[0]


MANY_STEPS = WORK._replace(steps=1024)
ONLY_FLOPS = WORK._replace(loop_bytes=0)


@pytest.mark.parametrize(
    ("cheap", "dear"),
    [
        ((WORK, BUILD), (WORK, BUILD._replace(rounds=64))),
        ((WORK, BUILD), (WORK, BUILD._replace(asynchronous=False))),
        ((ONLY_FLOPS, BUILD), (ONLY_FLOPS, BUILD._replace(from_registers=True))),
        ((WORK, BUILD), (WORK._replace(loop_bytes=4 * WORK.loop_bytes), BUILD)),
        ((WORK, BUILD), (WORK._replace(stream_bytes=WORK.loop_bytes), BUILD)),
        ((WORK, BUILD), (WORK._replace(epilogue_bytes=4 * WORK.epilogue_bytes), BUILD)),
        ((WORK, BUILD), (WORK._replace(total_bytes=1e9), BUILD)),
        ((WORK, BUILD), (WORK._replace(trips=1000), BUILD)),
        ((WORK, BUILD), (WORK, BUILD._replace(resident=1))),
        ((MANY_STEPS, BUILD), (MANY_STEPS._replace(stages=2), BUILD)),
    ],
)  # fmt: skip
def test_what_costs_time(cheap, dear):
    assert seconds(*dear) > 1.02 * seconds(*cheap)


def launched(**options):
    return {"BC": 128, "BR": 64, "BD": 128, "num_stages": 3, "num_warps": 8, **options}


KERNELS = ("project_kernel", "update_kernel", "resident_update_kernel")


def test_no_kernel_is_faster_than_its_floor():
    """On a machine without losses a kernel of many blocks comes near it."""
    ideal = Rates(
        l2=1e15, l2_of_one=1e14, round_trip=0, fill=0, launch=0, hidden=1, streaming=1, product=1
    )
    many = replace(CASE, matrices=33)
    for kernel in KERNELS:
        for one in (CASE, replace(CASE, rank=64), many):
            tile = launched(BR=128 if kernel == "project_kernel" else 64)
            _, work = work_of(kernel, one, tile)
            for rates in (RATES, ideal):
                assert seconds(work, BUILD, rates) >= 0.85 * floor(one, kernel)
        if kernel != "resident_update_kernel":
            assert seconds(work, BUILD, ideal) <= 1.2 * floor(many, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_bytes_and_flops_of_all_blocks_are_those_of_the_operation(kernel, dtype):
    """In half precision B is read in place of N and R."""
    case = replace(CASE, dtype=dtype, rank=128)
    _, work = work_of(kernel, case, launched(BR=128, parts=4))
    moved, flops = case.traffic()[predict._OPERATIONS[kernel]]
    assert work.blocks * work.flops == flops
    if kernel == "project_kernel":
        moved += work.blocks * 8 * 128 * 128
    elif (kernel, dtype) == ("update_kernel", "bf16"):
        moved -= 6 * 4096 * 128
    assert work.total_bytes == moved


def test_flops_a_byte_of_l2():
    """128 x 256 of half precision: 128 * 256 / (128 + 256); from float32 N and R it was half."""
    _, work = work_of("update_kernel", CASE, launched(BD=256))
    assert work.flops_a_byte == pytest.approx(85.3, abs=0.1)


def test_the_committed_record_says_what_it_is_and_is_no_better_than_the_floor():
    record = json.loads(predict.RESULT.read_text())
    run = record["runs"][-1]
    assert run["note"] == predict.TITLE
    assert run["rates"] == asdict(RATES)
    assert predict.TITLE in predict.RESULT.with_suffix(".txt").read_text()
    assert record["rows"]
    for row in record["rows"]:
        assert row["us"] >= row["floor_us"], row
    for milliseconds, least in totals(record["rows"]).values():
        assert milliseconds > least


def test_predicted_times_that_auto_goes_by_are_those_of_the_record():
    rows = [
        row for row in json.loads(predict.RESULT.read_text())["rows"] if row["version"] == "now"
    ]
    """Those that are left, where some were measured."""
    for row in (row for row in times.table() if row.source == "predicted"):
        shape = row.size._asdict() | {"dtype": "bf16"}
        del shape["side"]
        us = sum(each["us"] for each in rows if shape.items() <= each["case"].items())
        assert row.us == {"triton": pytest.approx(us, rel=0.005)}


def test_batches_are_those_of_the_gpu_that_is_predicted():
    """Matrices of N, R and B, and of a copy of G where its rows begin at odd places, in an H200's
    139 GiB / 128.
    """
    sizes = {(m, case.rows, case.cols): case.matrices for m, case, _ in predict.cases(("1b", "7b"))}
    room = 139 * 2**30 // 128
    each = {
        ("1b r512", 2048, 2048): 10 * 2048 * 512,
        ("1b r512", 5461, 2048): 10 * 5461 * 512,
        ("1b r512", 2048, 5461): 10 * 5461 * 512 + 2 * 2048 * 5461,
        ("7b r1024", 4096, 4096): 10 * 4096 * 1024,
        ("7b r1024", 4096, 11008): 10 * 11008 * 1024,
    }
    count = {("1b r512", 2048, 2048): 96}
    for key, needed in each.items():
        assert sizes[key] == min(room // needed, count.get(key, 1000))


def test_rows_of_other_models_and_versions_stay(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    launch = "channel_scale_kernel", {"BC": 256, "SWEEP": 1024}, FACTS
    monkeypatch.setattr(predict, "compiled", lambda case: iter([launch]))
    monkeypatch.setattr(predict, "cases", lambda names: ((f"{n} r64", CASE, 2) for n in names))
    out = tmp_path / "predict.json"
    for words in ("--models 60m,1b", "--models 1b --version old", "--models 1b"):
        predict.main([*words.split(), "--out", str(out)])
    record = json.loads(out.read_text())
    found = {(row["version"], row["model"]): row["run"] for row in record["rows"]}
    assert found == {("now", "60m r64"): 0, ("old", "1b r64"): 1, ("now", "1b r64"): 2}
    assert len(record["rows"]) == 3
    for run in record["runs"]:
        assert run["date"]
        assert run["environment"]["commit"]
    assert record["runs"][2]["command"] == "python -m bench.predict --models 1b"
    assert "old ms" in out.with_suffix(".txt").read_text()


def test_an_unknown_model_is_told(capsys):
    with pytest.raises(SystemExit):
        predict.main(["--models", "1b,8b"])
    assert "'8b' is not one of nano" in capsys.readouterr().err


def test_versions_stand_side_by_side():
    row = {"model": "1b", "count": 10, "us": 30.0, "floor_us": 10.0}
    rows = [{**row, "version": "before"}, {**row, "version": "now", "us": 20.0}] * 2
    assert totals(rows) == {("before", "1b"): (0.6, 0.2), ("now", "1b"): (0.4, 0.2)}
    text = predict.totals_table(rows)
    assert [column.header for column in text.columns][2:] == [
        "before ms (x floor)",
        "now ms (x floor)",
    ]
