"""Only for Beam: --setup_file wants a setup.py to make the workers' package from; everything stands in pyproject.toml."""

from setuptools import setup

setup()
