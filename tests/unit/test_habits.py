"""Habits of users and machines: inputs inside outputs, file systems without locks, addresses, names and paths as people
write them, terminals that know ASCII alone, mistakes in a plugin's own code."""

from __future__ import annotations

import errno
import fcntl
import importlib
import io
import os
import shlex
import sys
import tempfile
from asyncio import CancelledError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

import launch
from launch.record import run_directory
from launch.record.run_directory import check_inputs
from launch.run.command_line import told
from launch.run.config import compose
from perception.config import RewardConfig
from perception.errors import ActorError, DataError, StoppedError, UserError
from perception.registry import find_plugins
from reward_workers.combine import rewarded
from reward_workers.components import reward_terms
from runtime import cluster
from runtime.actors import Late
from runtime.loopback import confine_ray
from tests import builders
from tests.builders import changed, config, group, measured


@pytest.mark.parametrize(
    ("room", "setting", "value"),
    [
        ("model", "path", "{}/policy"),
        ("model", "path", "{}/../quickstart/policy"),
        ("model", "segmenter", "{}/segmenter"),
        ("data", "train", "{}/train.json"),
        ("data", "eval", "{}"),
        ("data", "images", "{}/images"),
        ("data", "also", {"shifted": "{}/shifted.json"}),
    ],
)
def test_inputs_inside_the_directory_that_a_new_run_moves_aside_are_refused(
    tmp_path: Path, room: str, setting: str, value: Any
) -> None:
    run_dir = tmp_path / "quickstart"
    filled = {k: v.format(run_dir) for k, v in value.items()} if isinstance(value, dict) else value.format(run_dir)
    inside = changed(config(tmp_path), room, **{setting: filled})
    with pytest.raises(
        UserError, match=rf"{room}\.{setting}.* lies in .*run\.name=quickstart; .*run\.name=quickstart-2"
    ):
        check_inputs(inside)
    check_inputs(changed(inside, "run", name="quickstart-2"))
    check_inputs(changed(inside, "run", resume="quickstart"))  # goes on in place: nothing is moved


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    run_directory.lock(tmp_path).close()
    assert "the file system has no locks" in caplog.text
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        run_directory.lock(tmp_path)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://head:8265"])
def test_a_dashboards_address_is_told_from_a_clusters(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match="that is a dashboard"):
        cluster.connect(config().placement)


@pytest.mark.parametrize("address", ["[::1]:1", "ray://[::1]:1", "127.0.0.1:1"])
def test_an_address_is_called_whatever_its_form(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []

    def create_connection(where: Any, timeout: float) -> None:
        called.append(where)
        raise ConnectionRefusedError

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("socket.create_connection", create_connection)
    with pytest.raises(UserError, match="nothing listens there"):
        cluster.connect(config().placement)
    assert called == [("127.0.0.1" if "127" in address else "::1", 1)]


def test_local_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    confine_ray()
    assert cluster.cluster_address() is None and os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("name", ["20240501", "-3", "1.5", "007", "2e-5-long"])
def test_a_run_may_be_called_by_a_number(name: str) -> None:
    assert compose(["recipe=quickstart", f"run.name={name}"]).run.name == name


@settings(max_examples=10)
@given(st.text(st.sampled_from("ab/._- =,()[]{}'\"#üéπ&;!*@~:"), min_size=1, max_size=12))
def test_a_path_that_hydra_cannot_read_is_refused_with_one_that_it_can(text: str) -> None:
    path, said = f"/d{text}x", ""
    try:
        found = compose(["recipe=quickstart", f"data.images={path}"]).data.images
    except UserError as error:
        said = str(error)
        (word,) = shlex.split(said.rpartition("quote the value: ")[2])
        found = compose(["recipe=quickstart", word]).data.images
    assert found == path and "\n" not in said


def test_a_terminal_that_knows_ascii_alone_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    importlib.reload(launch)
    print("gIoU █ ü", flush=True)
    assert ascii_only.buffer.getvalue() == b"gIoU \\u2588 \\xfc\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("length", "moved"), [(20, False), (90, True)])
def test_sockets_lie_where_their_paths_are_short_enough(
    length: int, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "VLLM_RPC_BASE_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * length)
    monkeypatch.setattr("ray.init", lambda *_, **__: None)
    cluster.connect(config().placement)
    expected = "/tmp" if moved else None
    assert os.environ.get("RAY_TMPDIR") == os.environ.get("VLLM_RPC_BASE_PATH") == expected


# ---------------------------------------------------------------- exit statuses


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("x"), 2),
        (DataError("x"), 2),
        (ActorError("x"), 1),
        (Late("x"), 1),
        (CancelledError(), 130),
        (StoppedError("x"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_the_exit_status_says_how_a_run_ended(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, told():
        raise error
    assert end.value.code == status and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("None.shape", "AttributeError"),
        ("len(3)", "TypeError"),
        ("{}['a']", "KeyError"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_mistake_in_a_plugin_is_one_line_with_its_place(
    statement: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"plugin_{kind.lower()}"
    file = tmp_path / f"{name}.py"
    file.write_text(f"def call():\n    return {statement}\n")
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("RELOOK_PLUGINS", "")
    find_plugins([str(file)])
    with pytest.raises(SystemExit) as end, told():
        sys.modules[name].call()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {file}:2: {kind}: ")


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system role') }}", "{{ messages[0]['content'] + 3 }}", "{% if %}", "{{ a.b.c }}"],
)
def test_a_mistake_in_a_chat_template_is_one_line(template: str, capsys: pytest.CaptureFixture[str]) -> None:
    def raise_exception(message: str) -> None:
        raise ValueError(message)

    def render() -> str:
        made = ImmutableSandboxedEnvironment().from_string(template)
        return made.render(messages=[{"content": "a"}], raise_exception=raise_exception)

    with pytest.raises(SystemExit), told():
        render()
    line = capsys.readouterr().err
    assert line.startswith("error: chat template") and len(line.splitlines()) == 1


def test_an_error_of_the_program_itself_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), told():
        _ = 1 / 0


# ---------------------------------------------------------------- rewards


def test_a_component_of_weight_0_is_not_measured_but_its_name_is_checked() -> None:
    reward = compose(
        ["recipe=quickstart", "reward.components.matched_iou=0", "reward.components.count_ratio=0.0"]
    ).reward
    assert reward_terms(reward).keys() == {"mask_iou", "answer_format"}
    one = measured(0.5, mask_iou=0.5, answer_format=1.0)  # the others were not measured
    (done,) = rewarded([group(one)], reward, None)
    assert done.trajectories[0].reward == pytest.approx(0.5 * 1.0 + 1.0 * 0.125)
    with pytest.raises(UserError, match="no component 'mask_iuo'"):
        reward_terms(changed(builders.config(), "reward", components={"mask_iuo": 0}).reward)


OWN = ("model.path=policy", "model.segmenter=sam2", "data.train=train.jsonl", "data.eval=eval.jsonl")


@pytest.mark.parametrize("recipe", ["quickstart", "dr_seg"])
def test_the_command_line_adds_to_components_or_replaces_them_all(recipe: str) -> None:
    def reward(*words: str) -> RewardConfig:
        return compose([f"recipe={recipe}", *OWN, *words]).reward

    preset = reward()
    assert reward("reward.components.parsed=2").components == preset.components | {"parsed": 2}
    replaced = reward("reward.components={parsed: 2}")
    assert (replaced.components, replaced.ranked) == ({"parsed": 2}, preset.ranked)
    assert reward("reward.ranked={box_iou: {weight: 1}}").ranked == {"box_iou": {"weight": 1}}
    assert reward("reward=vision_reasoner", "reward.components={}", "reward.ranked={parsed: 1}").components == {}
    older = reward("~reward.components", "+reward.components={parsed: 2}")  # as it had to be written before
    assert older.components == {"parsed": 2}
