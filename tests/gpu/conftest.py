"""The order of `make test-gpu`: the smallest whole run first, because nearly anything that is broken breaks it."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name != "test_two_steps_on_one_gpu[mini]")
