import json

import pytest

from lowrank_kernels.cli import main


@pytest.fixture
def command(capsys):
    """Runs a command line: exit status, standard output, lines of standard error."""

    def run(line):
        try:
            status = main(line.split())
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


@pytest.fixture
def json_of(command):
    """What a command prints with --json."""

    def run(line):
        status, out, err = command(f"{line} --json")
        assert (status, err) == (0, [])
        return json.loads(out)

    return run


@pytest.fixture
def refused(command):
    """The one line in which a command refuses its arguments."""

    def run(line):
        status, out, err = command(line)
        assert (status, out, len(err)) == (2, "", 1)
        return err[0]

    return run


@pytest.fixture
def tiny_config(tmp_path):
    """Writes the config of a small LLaMA, with changes, and says where."""

    def write(**changes):
        config = {
            "model_type": "llama",
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            **changes,
        }
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        return path

    return write
