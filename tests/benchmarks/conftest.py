"""A run of a script is made once for all the tests of a file: they go to one worker."""

import pytest


def pytest_itemcollected(item):
  item.add_marker(pytest.mark.xdist_group(item.path.stem))
