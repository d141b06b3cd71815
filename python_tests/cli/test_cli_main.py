import subprocess
import sys

import pytest


@pytest.mark.parametrize("line", ["", "nonsense", "env --nonsense", "plan", "plan --model"])
def test_a_wrong_command_line_is_one_line(refused, line):
    assert refused(line).startswith("lowrank_kernels")


def test_help_names_every_command(command):
    status, out, _ = command("--help")
    assert status == 0
    for name in ("env", "selftest", "plan", "explain"):
        assert f"\n    {name} " in out


def test_the_package_runs_as_a_module():
    arguments = [sys.executable, "-m", "lowrank_kernels", "plan", "--model", "none"]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 2
    assert "none is not one of nano" in result.stderr


def test_importing_the_commands_needs_no_transformers():
    code = "import sys, lowrank_kernels.cli; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
