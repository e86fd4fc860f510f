"""One Ray and one rollout engine for all tests that need no other: started by the first of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import ray

from runtime.cluster import ROOT
from tests.hf_reference import Reference
from tests.tiny_policy import build
from tests.trainer import Trainer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a Ray of their own come first, while none is shared: a process has one at a time."""
    items.sort(key=lambda item: item.get_closest_marker("own_ray") is None)


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """Its workers find this repository; its CPUs are more than there are, so that nothing waits for a seat."""
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=500 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A policy in transformers that a module's own engine starts from, and that the module may change."""
    return Reference(build(tmp_path_factory.mktemp("policy")))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def trainer(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Trainer]:
    """A pool of one engine, and the policy that it runs. Tests of the engine with version 0 come before the others."""
    trainer = Trainer(build(tmp_path_factory.mktemp("policy")))
    (info,) = await trainer.pool.start()
    assert info.version.startswith("0.")
    yield trainer
    await trainer.pool.shutdown()
