"""Guards models by name: directories, hub caches and hub ids lead to the same files; what the network does not give is
one line; every released size of SAM 2 and 2.1 is taken as Meta releases it."""

from __future__ import annotations

import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from omegaconf import OmegaConf
from safetensors.torch import save_file

from launch.run import checks, memory, models
from launch.run.models import directory, located
from perception.config import ModelConfig
from perception.errors import UserError
from reward_workers.segmenter import Segmenter, build, model_files
from synthetic.segmenter import mini_config
from tests import builders
from tests.builders import changed

REVISION, OLDER = "c" * 40, "a" * 40
ID = "some-lab/Tiny-VL.2"


def cache(home: Path, repository: str, content: dict[str, bytes], revision: str = REVISION, ref: str = "main") -> Path:
    """A model in a hub cache: blobs, a snapshot of links to them, and a ref that names the snapshot."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    for part in ("blobs", "refs", f"snapshots/{revision}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        blob = folder / "blobs" / f"{revision[:4]}-{name}"
        blob.write_bytes(data)
        (folder / "snapshots" / revision / name).symlink_to(Path("../../blobs") / blob.name)
    (folder / "refs" / ref).write_text(revision)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HF_HOME without a network, which the hub's client reads when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


WHOLE = {"config.json": b"{}", "model.safetensors": b"weights"}


def test_one_model_by_all_its_names(home: Path) -> None:
    folder = cache(home, ID, WHOLE)
    cache(home, ID, {"config.json": b"old", "model.safetensors": b"old"}, OLDER, ref="v1")
    snapshot = folder / "snapshots" / REVISION
    for name in (ID, f"{ID}@{REVISION}", str(folder), str(snapshot)):
        assert Path(directory("model.path", name)).samefile(snapshot), name
    for name in (f"{ID}@{OLDER}", f"{ID}@v1"):
        assert Path(directory("model.path", name)).samefile(folder / "snapshots" / OLDER), name


@pytest.mark.parametrize("name", ["random:tiny", "absent", "./absent/policy", "/absent/policy", "runs/a/policy"])
def test_other_names_stay_as_they_are(name: str, home: Path) -> None:
    assert directory("model.path", name) == name


def test_a_directory_comes_before_a_hub_id(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(home, "assets/policy", WHOLE)
    monkeypatch.chdir(home)
    (home / "assets/policy").mkdir(parents=True)
    assert directory("model.path", "assets/policy") == "assets/policy"


@pytest.mark.parametrize("content", [None, {"config.json": b"{}"}], ids=["nothing", "no weights"])
@pytest.mark.parametrize("key", ["model.path", "model.segmenter"])
def test_what_cannot_be_had_is_one_line_with_the_command(key: str, content: Any, home: Path) -> None:
    if content is not None:
        cache(home, ID, content)
    with pytest.raises(UserError, match=rf"^{key}={ID}: .*`hf download {ID}`") as told:
        directory(key, ID)
    assert "\n" not in str(told.value)


def test_what_the_cache_lacks_is_downloaded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, bool]] = []

    def download(repository: str, *, revision: str | None, local_files_only: bool, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, local_files_only))
        if local_files_only:
            raise FileNotFoundError("not cached")
        return str(cache(home, repository, WHOLE) / "snapshots" / REVISION)

    monkeypatch.setattr(models, "snapshot_download", download)
    assert directory("model.path", f"{ID}@v2").endswith(REVISION)
    assert asked == [(ID, "v2", True), (ID, "v2", False)]


def test_settings_with_both_models_by_name(home: Path) -> None:
    policy, segmenter = cache(home, ID, WHOLE), cache(home, "lab/sam", {"a.yaml": b"", "a.pt": b""})
    settings = changed(builders.config(home), "model", path=ID, segmenter="lab/sam", shape=None)
    found = located(settings).model
    assert Path(found.path).samefile(policy / "snapshots" / REVISION)
    assert Path(found.segmenter).samefile(segmenter / "snapshots" / REVISION)
    written = changed(settings, "model", shape="mini", path="not/there", segmenter="random:tiny")
    assert located(written) == written, "a policy that is yet to be written is no hub id"


# ---------------------------------------------------------------- SAM2 as Meta releases it

SAM2 = Path(str(find_spec("sam2").origin)).parent  # type: ignore[union-attr]  # importing it would set Hydra up
RELEASED = sorted(file for kind in ("sam2", "sam2.1") for file in (SAM2 / "configs" / kind).iterdir())


def released(folder: Path, config: Any, weights: dict[str, torch.Tensor]) -> ModelConfig:
    """As Meta's folders on the hub: a yaml and a .pt, and beside them transformers' own files."""
    OmegaConf.save(config, folder / "sam2.1_hiera_t.yaml")
    torch.save({"model": weights}, folder / "sam2.1_hiera_tiny.pt")
    save_file({"vision_encoder.neck.weight": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return ModelConfig(path="", segmenter=str(folder))


@pytest.mark.parametrize("file", RELEASED, ids=lambda file: file.stem)
def test_every_released_configuration_is_taken(file: Path, tmp_path: Path) -> None:
    assert len(RELEASED) == 8
    shutil.copy(file, tmp_path)
    version, _, size = file.stem.partition("_hiera_")
    name = {"t": "tiny", "s": "small", "b+": "base_plus", "l": "large"}[size]
    torch.save({"model": {"w": torch.zeros(3)}}, tmp_path / f"{version}_hiera_{name}.pt")
    model = ModelConfig(path="", segmenter=str(tmp_path))
    checks.check_segmenter(model)
    assert model_files(tmp_path)[0] == tmp_path / file.name
    (tmp_path / file.name).unlink()  # a weights file alone: its name says which configuration is its own
    checks.check_segmenter(model)
    assert model_files(tmp_path)[0].read_text() == file.read_text()


def test_metas_files_load_and_are_measured(tmp_path: Path) -> None:
    torch.manual_seed(3)
    weights = build(mini_config()).state_dict()
    model = released(tmp_path, mini_config(), weights)
    checks.check_segmenter(model)
    loaded = Segmenter.load(model.segmenter).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    size = (tmp_path / "sam2.1_hiera_tiny.pt").stat().st_size
    terms = memory.segmenter(changed(builders.config(tmp_path), "model", segmenter=model.segmenter))
    assert terms["weights"] == pytest.approx(size / 2**30)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


@pytest.mark.parametrize(
    "content",
    [b"", b"no weights at all", pickle.dumps({"model": Evil()}), pickle.dumps([1])],
    ids=["empty", "text", "runs code", "something else"],
)
def test_a_pt_that_is_no_sam2_is_one_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = released(tmp_path, mini_config(), {})
    (tmp_path / "sam2.1_hiera_tiny.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.segmenter=.*sam2\.1_hiera_tiny\.pt") as told:
        checks.check_segmenter(model)
    assert "\n" not in str(told.value) and "this ran" not in capsys.readouterr().out
