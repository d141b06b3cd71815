"""First contact: what is wrong is found, what hangs or dies is named, nothing is measured twice."""

import contextlib
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import first_contact
from bench import record as bench_record
from bench.cases import Case, make_inputs
from bench.contact import operations, profiled, steps, tables, tasks
from bench.contact.tasks import Skipped, Task
from bench.model_step import Problem
from bench.record import Journal
from bench.timing import Rates
from lowrank_kernels.ops import native

with contextlib.suppress(ImportError):
    import triton  # noqa: F401  # before a test takes TRITON_INTERPRET away

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--quick"]
CASE = Case(37, 61, 13, "bf16", "fira", 2)


def rows_in(folder):
    return json.loads((folder / "first_contact.json").read_text())["rows"]


def options_of(folder, *words):
    return first_contact.arguments_of([*QUICK, "--out", str(folder), *words])


def test_everything_runs_on_a_cpu_and_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [*QUICK, "--out", str(tmp_path)]
    first_contact.main(command)
    printed = capsys.readouterr().out
    for part in ("check", "rates", "operations", "python", "models"):
        assert f"{part}: " in printed
    skipped = [line for line in printed.splitlines() if "not done, needs" in line]
    assert {line.split(":")[0] for line in skipped} == {"rates", "replay", "profile", "tune"}
    assert "flashoptim (needs cuda)" in " ".join(printed.split())
    rows = rows_in(tmp_path)
    assert {row["part"] for row in rows} == set(first_contact.PARTS)
    assert not any("error" in row or "begun" in row for row in rows)
    parts = {part: [row for row in rows if row["part"] == part] for part in first_contact.PARTS}
    for row in parts["check"]:
        assert set(row["backends"]) == {"native", "foreach"}
        assert all(map(operations.is_right, row["backends"].values()))
    assert {row["method"] for row in parts["operations"]} == {"fira", "galore"}
    (model,) = parts["models"]
    assert {"adamw", "fira", "hybrid-fira"} <= set(model["results"])
    (python,) = parts["python"]
    assert python["results"]["fira native"]["ms"] > 0

    first_contact.main([*command, "--parts", "check,models"])
    assert [row for row in rows_in(tmp_path) if row["part"] in ("check", "models")] == [
        row for row in rows if row["part"] in ("check", "models")
    ]
    first_contact.main([*command, "--show"])
    assert "a step of a whole model" in capsys.readouterr().out


def one(name, run, hangs=60.0):
    return Task(name, run, hangs)


def raises(text):
    def run(*_):
        raise RuntimeError(text)

    return run


@pytest.fixture
def worker_is_a_fork(monkeypatch):
    """So that the tasks of a test are its tasks, and may take their process with them."""

    def run(command, **_):
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=first_contact.main, args=(command[3:],))
        process.start()
        process.join()
        return types.SimpleNamespace(returncode=process.exitcode)

    monkeypatch.setattr(first_contact, "end_with_supervisor", lambda: None)
    monkeypatch.setattr(first_contact, "subprocess", types.SimpleNamespace(run=run))


@pytest.mark.usefixtures("worker_is_a_fork")
def test_what_raises_hangs_or_dies_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    begun = tmp_path / "begun"

    def counted(name, run=dict):
        def counting():
            with begun.open("a") as file:
                file.write(f"{name} {os.getpid()}\n")
            return run()

        return one(name, counting, hangs=1.0 if name == "hangs" else 60.0)

    todo = [
        counted("good"),
        counted("raises", raises("not today")),
        counted("wrong", lambda: {"wrong": {"fira": 0.5}}),
        counted("hangs", lambda: time.sleep(60)),
        counted("dies", lambda: os._exit(9)),
        counted("breaks", raises("CUDA error: an illegal memory access")),
        counted("last"),
    ]
    monkeypatch.setitem(first_contact.PARTS, "tune", lambda options: iter(todo))
    monkeypatch.setitem(first_contact.PARTS, "models", raises("no list"))
    monkeypatch.setitem(tables.TABLES, "tune", lambda rows: f"{len(rows)} rows")
    command = [*QUICK, "--out", str(tmp_path), "--parts", "tune,models"]
    with pytest.raises(SystemExit, match="6 cases are wrong or failed"):
        first_contact.main(command)
    found = {row["case"]: row.get("error") for row in rows_in(tmp_path)}
    assert found == {
        "good": None,
        "raises": "RuntimeError: not today",
        "wrong": None,
        "hangs": "its process ended with status 1",
        "dies": "its process ended with status 9",
        "breaks": "RuntimeError: CUDA error: an illegal memory access",
        "last": None,
        "its cases": "RuntimeError: no list",
    }
    processes = dict(line.split() for line in begun.read_text().splitlines())
    assert list(processes) == [task.name for task in todo]
    good, raised, wrong, hung, died, broke, last = processes.values()
    assert good == raised == wrong == hung
    assert len({hung, died, broke, last}) == 4

    todo[:] = [counted(task.name) for task in todo]
    monkeypatch.setitem(first_contact.PARTS, "models", lambda options: iter(()))
    begun.unlink()
    first_contact.main(command)
    again = [line.split()[0] for line in begun.read_text().splitlines()]
    assert again == ["raises", "wrong", "hangs", "dies", "breaks"]
    assert not any(map(tables.failures, rows_in(tmp_path)))


@pytest.mark.usefixtures("worker_is_a_fork")
def test_nothing_begins_when_the_time_is_up(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(first_contact.PARTS, "tune", lambda options: iter([one("late", dict)]))
    command = [*QUICK, "--out", str(tmp_path), "--parts", "tune"]
    first_contact.main([*command, "--seconds", "-1"])
    assert "the time is up" in capfd.readouterr().err
    assert rows_in(tmp_path) == []


def test_a_case_that_hangs_holds_no_command_beyond_its_time(tmp_path, monkeypatch):
    limits, options, now = [], options_of(tmp_path), time.monotonic()
    monkeypatch.setattr(first_contact.time, "monotonic", lambda: now)
    watchdog = types.SimpleNamespace(
        dump_traceback_later=lambda seconds, exit: limits.append((seconds, exit)),
        cancel_dump_traceback_later=lambda: None,
    )
    monkeypatch.setattr(first_contact, "faulthandler", watchdog)
    journal = first_contact.record(tmp_path)
    for left in (1000.0, 5.0):
        first_contact.run(one("any", dict, hangs=200.0), journal, "tune", options, now + left)
    assert limits == [(200.0, True), (5.0 + first_contact.GRACE, True)]


def test_a_killed_command_leaves_a_record_that_the_next_one_goes_on_with(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "first_contact.json", "first_contact")
    journal.begin({"device": "one"})
    journal.put({"begun": True}, part="check", case="a")
    journal.put({"value": 1.0}, part="check", case="b")

    def killed(path, text):
        path.open("w").write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.put({"value": 3.0}, part="check", case="c")
    again = Journal(tmp_path / "first_contact.json", "first_contact")
    again.begin({"device": "other"})
    again.put({"value": 2.0}, part="check", case="a")
    assert again.find(part="check", case="a") == {
        **{"part": "check", "case": "a"},
        **{"run": 1, "value": 2.0},
    }
    assert [row["run"] for row in rows_in(tmp_path)] == [0, 1]


def sabotaged(spoil):
    """The native backend with a projection that spoils its result."""

    def project_moments(self, matrices, adam):
        return spoil(native.Operations.project_moments(self, matrices, adam))

    operations = type("Sabotaged", (native.Operations,), {"project_moments": project_moments})
    return types.SimpleNamespace(Operations=operations)


def racing():
    """Right, but for the last bit of an element, every other time."""
    calls = []

    def spoil(projection):
        calls.append(None)
        if len(calls) % 2:
            entry = projection.direction[0, 0, :1]
            entry.copy_(torch.nextafter(entry, entry.new_full((), torch.inf)))
        return projection

    return spoil


def unwritten(projection):
    """Allocated and not written: unless it is poisoned, memory holds what an earlier run left."""
    fresh = torch.empty_like(projection.direction)
    if not fresh.isnan().all():
        fresh.copy_(projection.direction)
    return projection._replace(direction=fresh)


def unsupported(projection):
    raise ValueError("out of resource: shared memory")


def test_races_wrong_and_unwritten_results_are_found():
    spoils = {
        "right": lambda projection: projection,
        "races": racing(),
        "wrong": lambda p: p._replace(direction=1.1 * p.direction),
        "unwritten": unwritten,
        "raises": unsupported,
    }
    modules = {name: sabotaged(spoil) for name, spoil in spoils.items()}
    row = {"case": "a", **operations.checked(CASE, modules, CPU)}
    found = row["backends"]
    assert {name for name, each in found.items() if operations.is_right(each)} == {"right"}
    assert "direction" in found["races"]["unequal"]
    assert found["races"]["shares"]["direction"] <= 1
    assert not found["wrong"]["unequal"]
    assert found["raises"] == {"raised": "ValueError: out of resource: shared memory"}
    assert tables.failures(row) == [
        "raises raised ValueError: out of resource: shared memory",
        *(f"{name} is wrong" for name in ("races", "wrong", "unwritten")),
    ]
    cells = [next(iter(column.cells)) for column in tables.check([row]).columns]
    assert cells[2].endswith("BITS direction")
    assert "WRONG direction" in cells[3]
    assert "WRONG direction" in cells[4]
    assert cells[5].startswith("RAISED ValueError")
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_error_of_the_device_ends_the_process():
    def lost(projection):
        raise RuntimeError("CUDA error: unspecified launch failure")

    with pytest.raises(RuntimeError, match="unspecified"):
        operations.checked(CASE, {"lost": sabotaged(lost)}, CPU)
    assert not tasks.is_fatal(torch.OutOfMemoryError("CUDA out of memory"))


def test_a_full_disk_is_no_fault_of_a_kernel():
    def full(projection):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        operations.checked(CASE, {"native": sabotaged(full)}, CPU)


def refusal(command, capfd):
    with pytest.raises(SystemExit) as ended:
        first_contact.main(command)
    assert ended.value.code == first_contact.UNUSABLE
    (line,) = capfd.readouterr().err.splitlines()
    return line


@pytest.fixture
def tiny_command(tmp_path, monkeypatch, worker_is_a_fork):
    """Of one case that does nothing."""
    monkeypatch.setitem(first_contact.PARTS, "tune", lambda options: iter([one("a", dict)]))
    monkeypatch.setitem(tables.TABLES, "tune", lambda rows: "")
    return [*QUICK, "--out", str(tmp_path / "contact"), "--parts", "tune"]


@pytest.mark.parametrize(
    ("name", "other"),
    [("device", "NVIDIA H200"), ("code", "0123abc"), ("quick", False), ("rounds", 15)],
)
def test_a_folder_with_figures_of_something_else_is_refused(
    name, other, tiny_command, tmp_path, monkeypatch, capfd
):
    first_contact.main(tiny_command)
    before = rows_in(tmp_path / "contact")
    kind = first_contact.kind_of(first_contact.arguments_of(tiny_command))
    changed = kind | {name: other}
    monkeypatch.setattr(first_contact, "kind_of", lambda options: changed)
    capfd.readouterr()
    line = refusal(tiny_command, capfd)
    assert f"contact holds figures of {name} {kind[name]}, not {other}: take another" in line
    assert rows_in(tmp_path / "contact") == before
    monkeypatch.setattr(first_contact, "kind_of", lambda options: kind)
    first_contact.main(tiny_command)


def test_files_that_change_meanwhile_are_noticed(tiny_command, tmp_path, monkeypatch):
    """By the worker that takes the place of one that died."""
    found = tmp_path / "kinds"
    found.write_text("aab")

    def kind_of(options):
        first, rest = found.read_text()[:1], found.read_text()[1:]
        found.write_text(rest)
        return {"code": first}

    monkeypatch.setattr(first_contact, "kind_of", kind_of)
    todo = [one("dies", lambda: os._exit(9)), one("next", dict)]
    monkeypatch.setitem(first_contact.PARTS, "tune", lambda options: iter(todo))
    with pytest.raises(SystemExit) as ended:
        first_contact.main(tiny_command)
    assert ended.value.code == first_contact.UNUSABLE
    assert [row["case"] for row in rows_in(tmp_path / "contact")] == ["dies"]


def test_the_device_is_part_of_what_a_folder_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(first_contact, "device_name", lambda device: f"a {device}")
    kind = first_contact.kind_of(options_of(tmp_path))
    assert kind["device"] == "a cpu"
    assert kind["quick"]
    assert kind["backend"] == "native"


def test_changed_files_are_another_code(monkeypatch):
    monkeypatch.setattr(bench_record, "commit", lambda folder: "abc")
    assert bench_record.code() == "abc"
    for found, begins in (("abc-dirty", "abc-dirty, sources "), (None, "no commit, sources ")):
        monkeypatch.setattr(bench_record, "commit", lambda folder, found=found: found)
        one = bench_record.code()
        assert one.startswith(begins)
        assert one == bench_record.code()
        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_bytes", lambda path: path.name[:1].encode())
            assert bench_record.code() != one


def test_a_folder_at_which_another_works_is_refused(tiny_command, tmp_path, capfd):
    with first_contact.locked(tmp_path / "contact"):
        assert "another command is at work there" in refusal(tiny_command, capfd)
    first_contact.main(tiny_command)


def test_a_damaged_record_is_named(tiny_command, tmp_path, capfd):
    path = tmp_path / "contact" / "first_contact.json"
    path.parent.mkdir()
    path.write_text('{"rows": [')
    assert f"{path} cannot be read, move it away: " in refusal(tiny_command, capfd)
    assert path.read_text() == '{"rows": ['


def test_a_folder_that_cannot_be_made_is_named(tiny_command, tmp_path, capfd):
    (tmp_path / "contact").write_text("a file")
    assert f"{tmp_path / 'contact'} cannot be written: " in refusal(tiny_command, capfd)


def test_a_disk_that_fills_up_ends_the_command_and_blames_no_case(
    tiny_command, tmp_path, monkeypatch, capfd
):
    """Of the worker's writes, all but that of a case that begins."""
    written, supervisor = Journal.put, os.getpid()

    def put(self, row, **key):
        if "begun" not in row and os.getpid() != supervisor:
            monkeypatch.setattr("pathlib.Path.write_text", full)
        return written(self, row, **key)

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "put", put)
    with pytest.raises(SystemExit) as ended:
        first_contact.main(tiny_command)
    assert ended.value.code == first_contact.UNUSABLE
    assert "first_contact.json cannot be written: " in capfd.readouterr().err
    (row,) = rows_in(tmp_path / "contact")
    assert "error" not in row


def started(folder, *words):
    """A command in a process of its own, once its worker is at the first of many cases."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.first_contact", *QUICK, *words, "--out", str(folder)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore it, and so would what they start.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr.readline().startswith("check: ")
    return process


def workers_of(process):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True)
    return [int(word) for word in found.stdout.split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_ends_with_its_supervisor(how, tmp_path):
    process = started(tmp_path)
    (worker,) = workers_of(process)
    process.send_signal(how)
    process.wait()
    limit = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not is_alive(worker)


def test_control_c_is_told_in_a_line(tmp_path):
    process = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    lines = process.communicate()[1].splitlines()
    assert process.returncode == first_contact.INTERRUPTED
    assert [line for line in lines if not line.startswith("check: ")] == [
        "first_contact: stopped; the same command goes on"
    ]


def test_an_empty_folder_has_nothing_to_show(tmp_path):
    with pytest.raises(SystemExit, match="has no figures"):
        first_contact.main([*QUICK, "--out", str(tmp_path), "--show"])


def test_the_cases_are_llamas_on_both_sides_and_odd_ones(tmp_path):
    options = first_contact.arguments_of(["--device", "cpu", "--out", str(tmp_path)])
    found = operations.checked_cases(options)
    names = [operations.name_of(case) for case in found]
    assert len(set(names)) == len(names)
    each = {((c.rows, c.cols), c.rank, c.side.name, c.method) for c in found}
    for method in ("fira", "fira-paper", "galore"):
        for shape, rank, side in [
            *(((2048, 2048), 512, side) for side in ("LEFT", "RIGHT")),
            *(((2048, 5461), 512, "LEFT"), ((5461, 2048), 512, "RIGHT")),
            *(((11008, 4096), 1024, "RIGHT"), ((4096, 4096), 64, "RIGHT")),
            *(((777, 1003), 101, "LEFT"), ((512, 1376), 128, "LEFT")),
        ]:
            assert (shape, rank, side, method) in each
    assert {case.dtype for case in found} == {"bf16"}


def test_a_program_that_left_something_out_of_the_cache_is_found(monkeypatch):
    l2_reads = pytest.importorskip("bench.contact.l2_reads")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 4 * 4 * l2_reads.BLOCK
    assert l2_reads.bytes_per_second(device, size, rounds=1) > 0
    right = l2_reads.read

    def lazy(source, programs):
        found = right(source, programs)
        found[1] ^= source[:1]
        return found

    monkeypatch.setattr(l2_reads, "read", lazy)
    with pytest.raises(RuntimeError, match="has not read all"):
        l2_reads.bytes_per_second(device, size, rounds=1)


def triton_options(tmp_path):
    pytest.importorskip("triton")
    options = options_of(tmp_path)
    options.backend = "triton"
    return options


def test_variants_are_other_tiles_than_the_one_that_is_taken(tmp_path):
    options = triton_options(tmp_path)
    from bench.tune import problems_of
    from lowrank_kernels.ops.triton import config

    case = Case(2048, 2048, 512, "bf16", "fira", 3)
    found = operations.variants(case, options)
    assert {kind for kind, _ in found.values()} == {"project", "update"}
    for name, (kind, variant) in found.items():
        taken = config.config_of(kind, problems_of(case)[kind], config.gpu_of(CPU))
        assert name.startswith(kind)
        assert variant._replace(split=1, stages=1) != taken._replace(split=1, stages=1)
    assert len({variant for _, variant in found.values()}) == len(found)


def test_a_variant_that_is_wrong_has_no_time_and_others_have(tmp_path, monkeypatch):
    from bench import tune

    options = triton_options(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spoils = {
        "good": lambda projection: projection,
        "bad": lambda p: p._replace(direction=2 * p[0]),
    }
    tried = {name: ("project", types.SimpleNamespace(_asdict=dict)) for name in spoils}
    monkeypatch.setattr(operations, "variants", lambda *_: tried)
    monkeypatch.setattr(operations, "rates_of", lambda *_: Rates(1e9, 1e9))
    made = iter(map(sabotaged, spoils.values()))
    monkeypatch.setattr(tune, "with_config", lambda *_: next(made))
    row = operations.operation_times(CASE, {"triton": native}, options)
    for each in row["operations"]:
        assert "direction" in each["wrong"]["bad"]
        depends = each["operation"] in ("project_moments", "step")
        assert ("good" in each["results"]) == depends
        assert "triton" in each["results"]
        assert "bad" not in each["results"]
    columns = tables.operations([{"case": "a", **row}]).columns
    assert list(columns[-3].cells) == ["good", "", "", "good"]
    assert list(columns[-1].cells) == ["1 of 2", "", "", "1 of 2"]
    assert tables.failures({"case": "a", **row}) == []


def test_a_wrong_kernel_is_told_and_fails_the_command(tmp_path):
    each = {"floor_ms": 1.0, "operation": "step", "results": {}, "wrong": {"triton": ["param"]}}
    row = {"case": "a", "method": "fira", "operations": [each], "configs": {}}
    assert tables.failures(row) == ["triton is wrong"]
    columns = tables.operations([{**row, "backend": "triton"}]).columns
    assert list(columns[3].cells) == ["WRONG param"]


def test_steps_are_taken_by_the_backends_that_serve_the_device(tmp_path, monkeypatch):
    modules = {"triton": None, "foreach": None}  # native was built without its CUDA half
    monkeypatch.setattr(steps.kernels, "candidates", lambda *_: (modules, {}))
    options = options_of(tmp_path)
    options.backend = "triton"
    small, large = (Problem(model, 32, "bf16") for model in ("9m", "7b"))
    few = {("adamw", ""), ("fira", "triton")}
    more = {("hybrid-fira", ""), ("fira", "foreach"), ("galore", "triton")}
    assert set(steps.subjects(large, options)) == few
    assert set(steps.subjects(small, options)) == few | more
    assert [task.name for task in steps.models(options)] == ["9m r32 bf16 triton"]


def test_a_replay_is_timed_beside_its_eager_step(monkeypatch, tmp_path):
    """The graph is the step itself here."""
    monkeypatch.setattr(steps, "need_gpu", lambda options: None)
    monkeypatch.setattr(steps, "captured", lambda run: lambda _: run())
    monkeypatch.setattr(steps, "here", lambda _, name, *names: iter([(name, "foreach")]))
    capturable = steps.capturable

    def without_adamw(groups, options):
        yield from list(capturable(groups, options))[1:]  # it wants a GPU

    monkeypatch.setattr(steps, "capturable", without_adamw)
    row = {"case": "a", **steps.replayed(Problem("9m", 32, "bf16", 512), options_of(tmp_path))}
    names = {f"{n} foreach {how}" for n in ("fira", "galore") for how in ("eager", "replay")}
    assert set(row["results"]) == set(row["host"]) == names
    assert set(tables.replay([row]).columns[1].cells) == names


CSV = """==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","smsp__inst.avg"
"","","us","register/thread","inst"
"0","project_kernel","1,234.5","168","7"
"1","update_kernel","80.25","n/a","8"
"""


def fake_ncu(folder, script):
    tool = folder / "ncu"
    tool.write_text(f"#!/bin/sh\n{script}")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)


def test_the_profilers_page_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "page").write_text(CSV)
    find_log = 'while [ "$1" != --log-file ]; do shift; done'
    fake_ncu(tmp_path, f'{find_log}\ncp "{tmp_path}/page" "$2"')
    row = {"case": "a", "kernels": profiled.profile(CASE, tmp_path)}
    time_name, registers = "gpu__time_duration.sum us", "launch__registers_per_thread"
    assert row["kernels"] == [
        {"kernel": "project_kernel", time_name: 1234.5, f"{registers} register/thread": 168.0},
        {"kernel": "update_kernel", time_name: 80.25, f"{registers} register/thread": "n/a"},
    ]
    assert "1234.5" in list(tables.profile([row]).columns[2].cells)


def test_without_a_profiler_or_counters_the_reason_is_told(tmp_path, monkeypatch):
    options = options_of(tmp_path)
    with pytest.raises(Skipped, match="needs a CUDA device"):
        operations.profile_of(CASE, options)
    options.device = "cuda"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Skipped, match="ncu is not on PATH"):
        operations.profile_of(CASE, options)
    fake_ncu(tmp_path, "echo '==ERROR== LibraryNotLoaded'; exit 1")
    with pytest.raises(Skipped, match="LibraryNotLoaded"):
        operations.profile_of(CASE, options)


def test_the_case_reaches_the_process_that_is_profiled(tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(profiled.shutil, "which", lambda name: name)
    monkeypatch.setattr(profiled.subprocess, "run", run)
    with pytest.raises(profiled.NotProfiled):
        profiled.profile(CASE, tmp_path)
    assert Case(**json.loads(commands[0][-1])) == CASE


def test_the_table_of_rates_has_what_a_gpu_adds():
    product = {"ms": 0.5, "spread": 0.0, "flops_per_second": 6.5e14}
    rows = [
        {"case": "copy and product", "bytes_per_second": 4.3e12, "flops_per_second": 7.9e14},
        {"case": "reads from L2", "bytes_per_second": 7.3e12},
        {"case": "launches", "python_us": 2.5, "queue_us": 2.0, "graph_us": 1.25},
        {"case": "products", "results": {"project_moments": product}},
    ]
    columns = tables.rates(rows).columns
    assert list(columns[1].cells) == [
        *("4300 GB/s", "7300 GB/s", "python_us 2.50, queue_us 2.00, graph_us 1.25"),
        "650.00 TFLOP/s, 0.500 ± 0 % ms",
    ]
    assert next(iter(columns[2].cells)) == "790.00 TFLOP/s"


def test_the_tuners_table_has_the_fastest_first():
    times = [{"ms": 0.5, "channels": 128}, {"ms": 0.75, "channels": 64}]
    found = tables.tune([{"case": "a", "times": times}, {"case": "b", "times": []}])
    assert list(found.columns[1].cells) == ["2", "0"]
    assert list(found.columns[2].cells) == ["0.5 128", ""]


def test_inputs_of_the_check_are_not_zeros():
    """Zeros hide what is not written."""
    assert all(t.abs().max() > 0 for each in make_inputs(CASE, CPU, 1) for t in each)
