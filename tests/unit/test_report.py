"""Guards the report: one file, no network, hostile text harmless, rewards that add up, curves in the right place."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.record import rollouts, run_directory
from launch.record.recorder import Recorder
from launch.record.summary import changes
from perception import images
from perception import metric_catalog as catalog
from perception.errors import UserError
from perception.metric_catalog import GREEDY, HeldOut
from perception.types import FailureKind, Group, Score, Trajectory
from report import write_report
from report.charts import BOTTOM, HEIGHT, LEFT, MAX_POINTS, RIGHT, TOP, WIDTH, Spec, chart
from report.drawing import MAX_SIDE
from report.gallery import Picture, breakdown, pictures, printable
from tests import builders
from tests.fake_run import HOSTILE, LOOK, config, scene_group, write_run

REWARD = {"components": {"mask_iou": 1.0, "parsed": 0.2}, "ranked": {"point_score": 0.5}, "rank": "none"}
LOOK_CHARTS = {"Re-look rate", "Threshold and confidence", "Gain of a second look", "Calibration error"}
HELD_OUT_LOOK_CHARTS = {"Held-out looked at again", "Held-out mask IoU gained by looking again"}


class Page(HTMLParser):
    """Every tag with its attributes, and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(write_run(tmp_path_factory.mktemp("report"), steps=20)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def relook(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(write_run(tmp_path_factory.mktemp("relook"), steps=20, look=LOOK)).read_text(encoding="utf-8")


@pytest.fixture(params=["plain", "relook"])
def html(request: pytest.FixtureRequest) -> str:
    page: str = request.getfixturevalue(request.param)
    return page


def test_the_page_needs_no_network(html: str) -> None:
    page = Page(html)
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert links and all(link and link.startswith(("data:image/", "#")) for link in links)
    assert not page.all("link") and not page.all("iframe")
    assert "url(" not in html and "@import" not in html
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy


def test_what_the_policy_wrote_stays_text(html: str) -> None:
    page = Page(html)
    assert len(page.all("script")) == 1 and not page.all("img")
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert "document.title='owned'" in page.text, "the failed answer is shown"
    assert "\u202e" not in html, "direction-changing characters are spelled out"


def test_headline_says_before_and_after(html: str) -> None:
    assert headline(html, "gIoU, greedy answers") == ["0.561", "0.598", "+0.037"]
    assert "held-out data <b>reason_seg, ignore=drop</b>" in html


def headline(html: str, label: str) -> list[str]:
    row = re.search(rf"<td>{label}</td>.*?</tr>", html, re.DOTALL)
    return re.findall(r">([-+\d.]+)</td>", row.group()) if row else []


def test_headline_names_further_sets_and_second_looks(plain: str, relook: str) -> None:
    assert headline(relook, "shifted: gIoU, greedy answers") == ["0.411", "0.448", "+0.037"]
    assert headline(relook, "looked at again") == ["0.920", "0.420", "-0.500"]
    assert headline(relook, "mask IoU gained by looking again") == ["0.012", "0.062", "+0.050"]
    assert not headline(plain, "looked at again") and "shifted" not in plain


def test_what_one_evaluation_lacks_is_no_change() -> None:
    greedy, gain = HeldOut("segment", "mask_iou", GREEDY), HeldOut("segment", catalog.LOOK_GAIN)
    rate, far = HeldOut("segment", catalog.LOOK_RATE), greedy._replace(held_out="far")
    samples, parsed = HeldOut("segment", catalog.SAMPLES), HeldOut("segment", catalog.PARSED, held_out="far")
    before = {far.name: 0.25, greedy.name: 0.5, gain.name: None, rate.name: math.nan, samples.name: 8}
    after = {greedy.name: 0.75, gain.name: 0.1, rate.name: 0.5, far.name: 0.5, parsed.name: 1.0}
    assert [(one.label, one.before, one.after) for one in changes(before, after)] == [
        ("gIoU, greedy answers", 0.5, 0.75),
        ("far: gIoU, greedy answers", 0.25, 0.5),
    ]


def titles(html: str) -> set[str]:
    return set(re.findall(r"<figcaption><h3>(.*?)</h3>", html))


def test_charts_of_second_looks_only_where_there_were_any(plain: str, relook: str) -> None:
    assert titles(relook) - titles(plain) == LOOK_CHARTS | HELD_OUT_LOOK_CHARTS
    assert "pass 1</span>" in relook and "pass 1</span>" not in plain and 'id="show-view"' not in plain


def charts(html: str) -> list[dict[str, Any]]:
    return [json.loads(figure["data-chart"] or "") for figure in Page(html).all("figure") if figure.get("data-chart")]


def test_every_held_out_set_has_its_curves(plain: str, relook: str) -> None:
    assert charts(plain)[0]["labels"] == ["greedy", "sampled"]
    assert charts(relook)[0]["labels"] == ["greedy", "sampled", "shifted, greedy", "shifted, sampled"]
    assert charts(relook)[0]["series"][2] == [pytest.approx(0.411), pytest.approx(0.448)]


def test_every_component_has_its_weight(tmp_path: Path) -> None:
    entry = scene_group(tmp_path, 5, 5.0, np.random.default_rng(0))
    with Recorder(config(tmp_path)) as recorder:
        recorder.step(1, {catalog.component("parsed"): 0.5}, [entry])
    page = write_report(recorder.run_dir).read_text()
    assert "Reward components" in titles(page)
    weights = re.findall(r"<td>(parsed|point_score)</td><td.*?</td><td class=\"num\">(.*?)</td>", page)
    assert set(weights) == {("parsed", "0.2"), ("point_score", "0.5")}


def drawn(entry: Group, folder: Path) -> Picture:
    path = folder / "train-000001.parquet"
    rollouts.write(path, 1, [entry])
    (picture,) = pictures(rollouts.read(path), REWARD, LOOK.pixels)
    return picture


def scored(entry: Group) -> list[tuple[Trajectory, Score]]:
    return [(one, one.score) for one in entry.trajectories if one.score is not None]


def pixels_of(uri: str | None) -> np.ndarray:
    return images.decode(base64.b64decode((uri or "").partition(",")[2]))


def test_passes_show_what_the_policy_was_shown_and_which_one_was_kept(tmp_path: Path) -> None:
    entry = scene_group(tmp_path, 12, 13.0, np.random.default_rng(0), LOOK)
    attempts = {attempt.index: attempt for attempt in drawn(entry, tmp_path).attempts}
    for trajectory, score in scored(entry):
        attempt = attempts[trajectory.index]
        if len(trajectory.turns) == 1:
            assert not attempt.passes
            continue
        first, second = attempt.passes
        view = trajectory.turns[1].view
        assert view is not None and first.view is None and first.crop is None
        assert second.view == (view.left, view.top, view.right - view.left, view.bottom - view.top)
        assert (pixels_of(second.crop) == images.decode(trajectory.turns[1].images[-1].ref)).all()
        assert [one.kept for one in attempt.passes] == [score.kept == 0, score.kept == 1]
        kept = attempt.passes[score.kept]
        assert (kept.boxes, kept.points, kept.mask, kept.iou) == (
            attempt.boxes, attempt.points, attempt.mask, attempt.iou
        )  # fmt: skip
    assert {score.kept for _, score in scored(entry)} == {0, 1}, "the scene was chosen to have both"


def test_the_page_marks_the_kept_pass_and_frames_the_view(tmp_path: Path) -> None:
    entry = scene_group(tmp_path, 12, 13.0, np.random.default_rng(0), LOOK)
    with Recorder(config(tmp_path, look=LOOK)) as recorder:
        recorder.step(1, {}, [entry])
    training = write_report(recorder.run_dir).read_text().partition("<h2>Failures")[0]
    looked = [(t, s) for t, s in scored(entry) if len(t.turns) > 1]
    captions = re.findall(r"pass (\d)</span> · confidence ([\d.]+) · IoU ([\d.]+)(.*?)</figcaption>", training)
    assert sorted((int(number), sure, iou, "kept" in mark) for number, sure, iou, mark in captions) == sorted(
        (place + 1, f"{one.confidence:.2f}", f"{one.mask_iou:.2f}", place == score.kept)
        for _, score in looked
        for place, one in enumerate(score.candidates)
    )
    page, hostile = Page(training), [turn for t, _ in looked for turn in t.turns[1:] if turn.text == HOSTILE]
    assert hostile and page.text.count(printable(HOSTILE)) == len(hostile) and not page.all("script")
    frames = re.findall(
        r'<g class="view-layer">\s*<rect class="case" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', training
    )
    closer = re.findall(r'viewBox="(.*?)" role="img" aria-label="[^"]*, a closer view"', training)
    assert len(looked) == len(closer) and [" ".join(frame) for frame in frames] == closer


def test_a_second_look_that_could_not_be_measured_is_shown_as_said(tmp_path: Path) -> None:
    entry = scene_group(tmp_path, 12, 13.0, np.random.default_rng(0), LOOK)
    failure = builders.failure(FailureKind.SCORER, "timed out")
    lost = tuple(replace(one, score=None, reward=None, failure=failure) for one in entry.trajectories)
    attempts = drawn(replace(entry, trajectories=lost), tmp_path).attempts
    shown = [one for attempt in attempts for one in attempt.passes]
    assert shown and all(one.text and one.confidence is None and not one.kept and not one.mask for one in shown)
    with Recorder(config(tmp_path, look=LOOK)) as recorder:
        recorder.step(1, {}, [replace(entry, trajectories=lost)])
    assert "pass 2</span></figcaption>" in write_report(recorder.run_dir).read_text()


def test_charts_carry_the_recorded_values(html: str) -> None:
    data = charts(html)
    stages = next(d for d in data if d["labels"] == ["generate", "score", "learn", "sync", "controller"])
    assert stages["steps"] == list(range(1, 21))
    entropy = next(d for d in data if d["labels"] == ["entropy"])
    assert entropy["series"][0][6] is None, "a NaN is a gap"


def test_every_picture_is_inside(html: str) -> None:
    for image in Page(html).all("image"):
        encoded = (image["href"] or "").partition("base64,")[2]
        assert cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_COLOR) is not None


def test_a_run_cut_short_still_has_a_report(tmp_path: Path) -> None:
    with Recorder(config(tmp_path)) as recorder:
        pass
    assert "no before and after" in write_report(recorder.run_dir).read_text()
    with pytest.raises(UserError, match="no run there"):
        write_report(tmp_path / "absent")


def test_an_image_that_does_not_decode_is_said(tmp_path: Path) -> None:
    entry = scene_group(tmp_path, 5, 5.0, np.random.default_rng(0))
    Path(entry.prompt.sample.image.path).write_bytes(b"not an image")
    with Recorder(config(tmp_path)) as recorder:
        recorder.step(1, {}, [entry])
    assert "do not decode" in write_report(recorder.run_dir).read_text()


def test_large_images_are_shown_smaller_and_overlays_keep_their_frame(tmp_path: Path) -> None:
    entry = scene_group(tmp_path, 5, 5.0, np.random.default_rng(0))
    image = np.random.default_rng(0).integers(0, 255, (450, 900, 3), dtype=np.uint8)
    cv2.imwrite(entry.prompt.sample.image.path, image)
    sample = replace(entry.prompt.sample, height=450, width=900)
    picture = drawn(replace(entry, prompt=replace(entry.prompt, sample=sample)), tmp_path)
    assert picture.image is not None and (picture.width, picture.height) == (900, 450)
    assert pixels_of(picture.image).shape == (MAX_SIDE // 2, MAX_SIDE, 3)


def row(reward: float | None, failure: str | None = None, **metrics: float) -> dict[str, Any]:
    return {"reward": reward, "failure": failure, "metrics": metrics}


def test_breakdown_adds_up() -> None:
    parts = breakdown(row(1.1, mask_iou=0.6, parsed=1.0, point_score=0.6), REWARD)
    assert [(part.name, part.points) for part in parts] == [("mask_iou", 0.6), ("parsed", 0.2), ("point_score", 0.3)]


def test_breakdown_shows_ranks_as_one_sum() -> None:
    parts = breakdown(row(1.2, mask_iou=0.6, parsed=1.0, point_score=9.0), REWARD | {"rank": "ecdf"})
    assert [(part.name, part.points) for part in parts[:3]] == [
        ("mask_iou", 0.6),
        ("parsed", 0.2),
        ("point_score", None),
    ]
    assert parts[3].name == "by rank" and parts[3].points == pytest.approx(0.4)


def test_breakdown_shows_the_rule_for_failures() -> None:
    parts = breakdown(row(0.0, "truncated", mask_iou=0.5, parsed=1.0, point_score=0.0), REWARD)
    assert parts[-1].name == "rule for failed answers" and parts[-1].points == pytest.approx(-0.7)


def test_breakdown_lists_what_is_only_measured() -> None:
    parts = breakdown(row(None, box_iou=0.4, mask_iou=0.5), REWARD)
    assert all(part.points is None for part in parts)
    assert ("box_iou", 0.4) in [(part.name, part.raw) for part in parts]


def test_printable_spells_out_and_cuts() -> None:
    assert printable("a\u202eb\x1b[0m\ud800\n") == "a\\u202eb\\u001b[0m\\ud800\n"
    assert printable("x" * 10_000).endswith("… 6,000 more characters")
    printable(HOSTILE).encode("utf-8")


def records(values: list[float | None]) -> list[dict[str, float | None]]:
    return [{"step": float(i), "m": value} for i, value in enumerate(values)]


def test_a_line_through_known_points() -> None:
    drawn = chart(Spec("t", "u", {"m": "m"}), records([0.0, 1.0, None, 2.0]))
    assert drawn is not None
    bottom, middle, right = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2, WIDTH - RIGHT
    third = LEFT + (right - LEFT) / 3
    assert drawn.series[0].path == f"M{LEFT:.1f} {bottom:.1f}L{third:.1f} {middle:.1f}M{right:.1f} {TOP:.1f}"
    assert [tick.label for tick in drawn.y_ticks] == ["0.0", "0.5", "1.0", "1.5", "2.0"]


def test_stacked_areas_end_at_the_sum() -> None:
    rows = [{"step": 1.0, "a": 1.0, "b": 3.0}, {"step": 2.0, "a": 2.0, "b": 2.0}]
    drawn = chart(Spec("t", "s", {"a": "a", "b": "b"}, stacked=True), rows)
    assert drawn is not None and drawn.y_ticks[-1].label == "4"
    assert drawn.series[1].path.startswith(f"M{LEFT:.1f} {TOP:.1f}L{WIDTH - RIGHT:.1f} {TOP:.1f}L")


def test_nothing_recorded_draws_nothing() -> None:
    assert chart(Spec("t", "u", {"m": "m"}), []) is None
    assert chart(Spec("t", "u", {"m": "m"}), records([None, None])) is None


def test_long_runs_are_thinned_by_means() -> None:
    drawn = chart(Spec("t", "u", {"m": "m"}), records([float(i) for i in range(10_000)]))
    assert drawn is not None and len(drawn.steps) <= MAX_POINTS
    stride = 10_000 / len(drawn.steps)
    assert drawn.series[0].values[0] == pytest.approx((stride - 1) / 2, abs=1)


@settings(max_examples=50)
@given(st.lists(st.one_of(st.none(), st.floats(-1e12, 1e12)), min_size=1, max_size=40), st.booleans(), st.booleans())
def test_any_finite_curve_stays_inside_its_frame(values: list[float | None], stacked: bool, smooth: bool) -> None:
    if stacked:
        values = [None if value is None else abs(value) for value in values]
    drawn = chart(Spec("t", "u", {"m": "m"}, stacked=stacked, smooth=smooth), records(values))
    assert (drawn is None) == all(value is None for value in values)
    if drawn is not None:
        ys = [float(y) for _, y in re.findall(r"[ML](\S+?) ([-\d.]+)", drawn.series[0].path)]
        assert ys and all(math.isfinite(y) and TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1 for y in ys)
        assert 2 <= len(drawn.y_ticks) <= 8 and len({tick.label for tick in drawn.y_ticks}) == len(drawn.y_ticks)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.report import main

    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and run_directory.CONFIG in message
