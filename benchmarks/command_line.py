"""The command line of the benchmarks."""

import argparse


def create_parser(description: str | None) -> argparse.ArgumentParser:
    """Create a parser whose help has the text as it stands, and whose options have one spelling.

    Args:
        description: The docstring of the script.

    Returns:
        The parser, without arguments.
    """
    return argparse.ArgumentParser(
        allow_abbrev=False,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
