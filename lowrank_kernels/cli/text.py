"""What a terminal shows: JSON, and mistakes in one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """What the user has to change, in one line; it ends a command with exit status 2."""


@contextmanager
def user_errors() -> Iterator[None]:
    """A ValueError of the library as a `UserError`."""
    try:
        yield
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None


def as_json(facts: Any) -> str:
    """JSON for programs; what it does not know is printed as text."""
    return json.dumps(facts, indent=2, default=str)
