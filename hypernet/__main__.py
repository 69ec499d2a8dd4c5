"""The command `hypernet`, also as `python -m hypernet`."""

import sys


def run_command() -> None:
    """Ctrl-C ends it in one line while its modules are imported too, which is most of a short command's time."""
    try:
        from hypernet.cli.main import main

        main()
    except KeyboardInterrupt:
        print("hypernet: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_command()
