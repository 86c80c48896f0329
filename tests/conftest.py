"""What all tests share."""

import pytest

from windfall.store import Lab


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What is tested was compiled and measured by these tests; the user's cache is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINDFALL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def lab(tmp_path):
    """An empty one."""
    opened = Lab(tmp_path / "lab")
    yield opened
    opened.close()
