"""What the tests of the emulated kernels share."""

from __future__ import annotations

import pytest

from tests.emulator.backend import emulated


@pytest.fixture
def ops(request):
    """The raw ops, of the backend that is forced meanwhile. Threads run in an order of their own in every test."""
    with emulated(request.node.nodeid) as ops:
        yield ops
