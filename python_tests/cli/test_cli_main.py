import subprocess
import sys

import pytest

import lowrank_kernels


@pytest.mark.parametrize("line", ["nonsense", "env --nonsense", "plan", "plan --model"])
def test_a_wrong_command_line_is_one_line(refused, line):
    assert refused(line).startswith("python -m lowrank_kernels")


def test_a_bare_call_lists_the_commands(command):
    status, out, err = command("")
    assert (status, out) == (2, "")
    assert "\n".join(err) == command("--help")[1].rstrip()


def test_the_version(command):
    assert command("--version") == (0, f"lowrank_kernels {lowrank_kernels.__version__}\n", [])


def test_help_names_every_command(command):
    status, out, _ = command("--help")
    assert status == 0
    for name in ("env", "selftest", "plan", "explain"):
        assert f"\n    {name} " in out
    for line in out[out.index("examples:") :].splitlines()[1:-1]:
        assert line.startswith("  python -m lowrank_kernels ")


def test_the_package_runs_as_a_module():
    arguments = [sys.executable, "-m", "lowrank_kernels", "plan", "--model", "none"]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 2
    assert "none is not one of nano" in result.stderr


def test_importing_the_commands_needs_no_transformers():
    code = "import sys, lowrank_kernels.cli; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
