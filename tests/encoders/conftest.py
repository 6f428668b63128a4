import pytest


@pytest.fixture(autouse=True)
def loaded_encoders() -> None:
    """Here loading is what is tested: every test loads its own."""
