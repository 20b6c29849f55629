"""Runs the command line: `python -m gve`."""

from gve.cli import main

if __name__ == "__main__":
    main()
