"""Command-line arguments of the commands that Hydra does not parse."""

from __future__ import annotations

import argparse
import textwrap
from typing import NoReturn

from fashionnet.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose refusals are user errors, told in one line."""

    def __init__(self, module: str, doc: str | None) -> None:
        super().__init__(
            prog=f"python -m fashionnet.{module}",
            description=textwrap.dedent(doc or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print with its usage."""
        raise UserError(f"{message}; see {self.prog} --help")
