"""The subcommands by name.

Each module has `SUMMARY`, `facts`, what `--json` prints, and `as_text`, the same for people; with
options of its own also `add_arguments`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..ops import BackendUnavailable
from . import env, explain, plan, selftest
from .text import UserError, as_json

COMMANDS = {"env": env, "selftest": selftest, "plan": plan, "explain": explain}

PROGRAM = "python -m lowrank_kernels"
EXAMPLES = f"""examples:
  {PROGRAM} plan --model 7b --rank 1024 --card h100
  {PROGRAM} plan --config path/to/config.json --memory 48
  {PROGRAM} explain --config path/to/config.json --rank 128
  {PROGRAM} COMMAND --help"""


class Parser(argparse.ArgumentParser):
    """argparse without the usage in front of an error."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        arguments: of the command line; None takes the process' own.

    Returns:
        The exit status: 0, 1 if the self-test found something wrong, 2 for a mistake of the user.
    """
    # The commands print the choice of a backend themselves.
    logging.getLogger("lowrank_kernels").addHandler(logging.NullHandler())
    parser = Parser(
        prog=PROGRAM,
        description="Low-rank optimizers for PyTorch: what runs here, and what a model takes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lowrank_kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for name, module in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        subparser.add_argument("--json", action="store_true", help="print JSON instead of text")
        if hasattr(module, "add_arguments"):
            module.add_arguments(subparser)
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    command = COMMANDS[args.command]
    try:
        facts = command.facts(args)
    except (UserError, BackendUnavailable) as error:
        print(f"{PROGRAM} {args.command}: {error}", file=sys.stderr)
        return 2
    print(as_json(facts) if args.json else command.as_text(facts))
    return 0 if facts.get("passed", True) else 1
