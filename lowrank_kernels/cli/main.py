"""The subcommands by name; each module has `SUMMARY`, `add_arguments` and `run`."""

import logging
import sys
from collections.abc import Sequence

from ..ops import BackendUnavailable
from . import env, explain, plan, selftest
from .errors import Parser, UserError

COMMANDS = {"env": env, "selftest": selftest, "plan": plan, "explain": explain}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        arguments: of the command line; None takes the process' own.

    Returns:
        The exit status: 0, 1 if the self-test found something wrong, 2 for a mistake of the user.
    """
    # The commands print the choice of a backend themselves.
    logging.getLogger("lowrank_kernels").addHandler(logging.NullHandler())
    parser = Parser(prog="lowrank_kernels", description="Low-rank optimizers for PyTorch.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        subparser.add_argument("--json", action="store_true", help="print JSON instead of text")
        module.add_arguments(subparser)
    args = parser.parse_args(arguments)
    try:
        return COMMANDS[args.command].run(args)
    except (UserError, BackendUnavailable) as error:
        print(f"lowrank_kernels {args.command}: {error}", file=sys.stderr)
        return 2
