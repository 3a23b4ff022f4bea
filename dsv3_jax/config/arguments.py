"""The command-line arguments that choose a configuration, alike in every program."""

import argparse


def add_config_arguments(
    parser: argparse.ArgumentParser, config: str = "config", *, default: str | None = None, required: bool = True
) -> None:
    """Adds the configuration file and `--set`, to be given to `load_config(given.config, given.set)`.

    Args:
        config: "config" for a positional argument, "--config" for an option.
        default: the file taken when none is given; None: one must be given.
        required: of an option without a default; a program may take something else in its place.
    """
    note = "" if default is None else f" (default {default})"
    help_text = f"a file of configs/, or your own like it{note}"
    if config.startswith("-"):
        parser.add_argument(
            config, metavar="FILE", default=default, help=help_text, required=required and default is None
        )
    else:
        nargs = None if default is None else "?"
        parser.add_argument(config, metavar="FILE", default=default, help=help_text, nargs=nargs)
    add_set_argument(parser)


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--set` alone, for a program that has a configuration of its own."""
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change fields of the configuration: --set train.lr.peak=1e-3 train.seq_len=512",
    )
