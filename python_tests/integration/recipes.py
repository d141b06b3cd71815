"""The recipes of docs/many-gpus.md, run as they are written there."""

import re
from pathlib import Path

from integration.easy_tasks import GAP, RANK

PAGE = Path(__file__).parents[2] / "docs" / "many-gpus.md"
LINES = 17
# What a tiny model on a CPU has otherwise.
SMALLER = {
    "rank=1024": f"rank={RANK}, update_proj_gap={GAP}, weight_decay=0.01",
    ", device_ids=[local_rank]": "",
}


def recipe(title):
    """The code under a heading."""
    heading = rf"^### {re.escape(title)}\n.*?```python\n(.*?)```"
    code = re.search(heading, PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    assert len(code.splitlines()) <= LINES, title
    for text, smaller in SMALLER.items():
        code = code.replace(text, smaller)
    return code


def cook(title, **names):
    """All names that there are after a recipe that starts with some."""
    exec(compile(recipe(title), title, "exec"), names)
    return names
