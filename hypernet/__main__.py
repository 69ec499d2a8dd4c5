"""`python -m hypernet` is the command `hypernet`."""

from hypernet.cli.main import main

if __name__ == "__main__":
    main()
