"""Guards which runs confine Ray to this machine: their own, and those that join a Ray which is so confined."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest

from runtime.loopback import confine_ray

LOOPBACK, TOKEN = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_TOKEN"
NAMES = (LOOPBACK, TOKEN, "RAY_AUTH_MODE", "RAY_ADDRESS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back in any case
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "ray", raising=False)


def settings() -> dict[str, str]:
    confine_ray()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_a_local_run_has_a_random_token_and_stays_on_loopback() -> None:
    first = settings()
    assert first.keys() == set(NAMES) - {"RAY_ADDRESS"}
    assert (first[LOOPBACK], first["RAY_AUTH_MODE"], first["GLOO_SOCKET_IFNAME"]) == ("0", "token", "lo")
    assert len(bytes.fromhex(first[TOKEN])) == 32
    assert settings() == first  # also in the processes that inherit it
    del os.environ[TOKEN]
    assert settings()[TOKEN] != first[TOKEN]


def test_the_users_own_token_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "mine")
    assert settings()[TOKEN] == "mine"


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "[::1]:6379", "ray://127.0.0.1:10001"])
def test_who_joins_a_ray_on_loopback_stays_there_with_its_token(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert settings() == {LOOPBACK: "0", "RAY_ADDRESS": address}


def test_a_worker_of_ray_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    assert settings() == {}


@pytest.mark.parametrize("address", ["10.0.0.7:6379", "head.example:6379", "auto", "ray://10.0.0.7:10001"])
def test_a_cluster_is_left_as_it_is(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert settings() == {"RAY_ADDRESS": address}
