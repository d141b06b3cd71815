"""The bench of AdamW runs, and its candidates step what they are named after."""

import torch

from bench import adamw


def test_a_quick_run_prints_a_row_for_each_format(capsys):
    threads = torch.get_num_threads()
    adamw.main(["--quick", "--threads", str(threads)])
    printed = capsys.readouterr().out
    names = ("float32", "bfloat16", "int8")
    for name in [*(f"ours, moments in {name}" for name in names), "fused, all in bfloat16"]:
        assert name in printed
