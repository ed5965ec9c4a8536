"""`python -m minillm`: the same as the `minillm` command."""

from minillm.cli.main import app

if __name__ == "__main__":
    app(prog_name="minillm")
