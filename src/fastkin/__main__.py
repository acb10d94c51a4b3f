"""`python -m fastkin`: the same as the `fastkin` command."""

from fastkin.commands.cli import main

if __name__ == "__main__":
    main()
