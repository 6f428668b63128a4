from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def loaded_encoders() -> None:
    """Here loading is what is tested: every test loads its own."""


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for the tests of one module, which keep nothing of their models in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBEAM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    """An empty cache."""
    monkeypatch.setenv("EMBEAM_CACHE_DIR", str(tmp_path / "cache"))
