"""How fast and how large the product is, beside a named reference in the same run; see README.md."""
