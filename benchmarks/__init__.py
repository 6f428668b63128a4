"""Measures speed and memory of the product beside a named reference in the same run; see README.md."""
