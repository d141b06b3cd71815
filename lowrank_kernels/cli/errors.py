"""Mistakes of the user, which end a command with one line and exit status 2."""

import argparse
from typing import NoReturn


class UserError(Exception):
    """What the user has to change, in one line."""


class Parser(argparse.ArgumentParser):
    """argparse without the usage in front of an error."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")
