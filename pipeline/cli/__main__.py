"""`python -m pipeline.cli` is the command `embeam`."""

from pipeline.cli.main import run

run()
