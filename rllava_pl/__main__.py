"""``python -m rllava_pl`` and the command ``rllava-pl``."""

from rllava_pl import cli


def main() -> None:
    """Run the command line; what ``rllava_pl.cli.main`` returns is for callers in Python."""
    cli.main()


if __name__ == "__main__":
    main()
