"""The subcommands by name; each module has `SUMMARY`, `add_arguments` and `run`."""

import argparse
import logging
import sys
from collections.abc import Sequence

from .. import __version__
from ..ops import BackendUnavailable
from . import env, explain, plan, selftest
from .errors import Parser, UserError

COMMANDS = {"env": env, "selftest": selftest, "plan": plan, "explain": explain}

PROGRAM = "python -m lowrank_kernels"
EXAMPLES = f"""examples:
  {PROGRAM} plan --model 7b --rank 1024 --card h100
  {PROGRAM} plan --config path/to/config.json --memory 48
  {PROGRAM} explain --config path/to/config.json --rank 128
  {PROGRAM} COMMAND --help"""


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
        module.add_arguments(subparser)
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return COMMANDS[args.command].run(args)
    except (UserError, BackendUnavailable) as error:
        print(f"{PROGRAM} {args.command}: {error}", file=sys.stderr)
        return 2
