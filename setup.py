"""Only for Beam, whose --setup_file wants a setup.py to pack for the workers: everything stands in pyproject.toml."""

from setuptools import setup

setup()
