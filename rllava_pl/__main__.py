"""``python -m rllava_pl`` and the command ``rllava-pl``."""

from __future__ import annotations

import sys
from types import TracebackType

from rllava_pl import cli
from rllava_pl.redaction import traceback_text


def main(args: list[str] | None = None) -> None:
    """Run the command line; what ``rllava_pl.cli.main`` returns is for Python, not for a shell."""
    sys.excepthook = _show
    cli.main(args)


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    print(traceback_text(error), end="", file=sys.stderr)


if __name__ == "__main__":
    main()
