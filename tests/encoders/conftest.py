from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def loaded_encoders() -> None:
    """Here loading is what is tested: every test loads its own."""


@pytest.fixture(scope="module")
def _module_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def module_cache(_module_folder: str) -> Iterator[None]:
    """One cache for the tests of a module that make models: the user's would keep what is found out of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBEAM_CACHE_DIR", _module_folder)
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    """An empty cache."""
    monkeypatch.setenv("EMBEAM_CACHE_DIR", str(tmp_path / "cache"))
