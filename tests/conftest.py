"""What all tests share."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What is tested was compiled and measured by these tests; the user's cache is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINDFALL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
