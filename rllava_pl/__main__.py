"""``python -m rllava_pl`` and the command ``rllava-pl``."""

from __future__ import annotations

from rllava_pl import cli


def main(args: list[str] | None = None) -> None:
    """Run the command line; what ``rllava_pl.cli.main`` returns is for Python, not for a shell."""
    cli.main(args)


if __name__ == "__main__":
    main()
