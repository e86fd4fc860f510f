"""Guards the SAM2 tool: equal to sam2's own predictor, batched, cached, and harmless to the program's Hydra."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from perception.types import MaskPrompt
from reward_workers.segmenter import Embedding, Segmentation, Segmenter, _agreement, build, official_config
from synthetic.scenes import generate
from synthetic.segmenter import mini_config, train_tool
from tests.builders import noise

BOXES = np.array([[10, 12, 60, 70], [30, 5, 100, 90], [5, 60, 50, 108]], np.float32)
POINTS = np.array([[30, 40], [60, 50], [20, 80]], np.float32)


def prompts(boxes: np.ndarray | None = BOXES, points: np.ndarray | None = POINTS) -> list[MaskPrompt]:
    """Three prompts of a box, of a point, or of both."""
    return [
        MaskPrompt(
            box=tuple(boxes[i].tolist()) if boxes is not None else None,
            points=(tuple(points[i].tolist()),) if points is not None else (),
        )
        for i in range(3)
    ]


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Segmenter(build(mini_config()), "cpu")


def image(seed: int = 0, height: int = 90, width: int = 112) -> np.ndarray:
    return noise(seed, height, width)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize(("boxes", "points"), [(BOXES, None), (BOXES, POINTS), (None, POINTS)])
def test_equals_sam2s_own_predictor(
    segmenter: Segmenter, boxes: np.ndarray | None, points: np.ndarray | None, multimask: bool
) -> None:
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(segmenter.model)
    side = segmenter.side
    predictor._bb_feat_sizes = [(side // n, side // n) for n in (4, 8, 16)]
    predictor.set_image(image())
    given = {}
    if boxes is not None:
        given["box"] = boxes
    if points is not None:
        given |= {"point_coords": points[:, None], "point_labels": np.ones((3, 1), np.int32)}
    expected, scores, _ = predictor.predict(**given, multimask_output=multimask, return_logits=True)
    best = scores.argmax(1)
    embedding = segmenter.encode([image()])[0]
    logits, iou = segmenter.decode(embedding, prompts(boxes, points), multimask)
    np.testing.assert_allclose(iou.numpy(), scores[np.arange(3), best], atol=1e-5)
    full = torch.nn.functional.interpolate(logits[None], image().shape[:2], mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(full.numpy(), expected[np.arange(3), best], atol=1e-4)


def test_batches_equal_single_calls(segmenter: Segmenter) -> None:
    """Images of different sizes in one call; prompts of all kinds in one call."""
    pictures = [image(1), image(2, 64, 200), image(3, 30, 20)]
    for one, many in zip([segmenter.encode([p])[0] for p in pictures], segmenter.encode(pictures), strict=True):
        assert (one.height, one.width) == (many.height, many.width)
        for a, b in zip(one.maps, many.maps, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    embedding = segmenter.encode([image()])[0]
    whole = prompts()
    mixed = [replace(whole[0], box=None), replace(whole[1], points=()), whole[2]]
    logits, iou = segmenter.decode(embedding, mixed)
    for i in range(3):
        alone, score = segmenter.decode(embedding, mixed[i : i + 1])
        torch.testing.assert_close(alone[0], logits[i], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(score[0], iou[i], atol=1e-5, rtol=1e-4)


MANY = (MaskPrompt(points=((30, 40), (60, 50)), labels=(1, 0)), MaskPrompt(box=(10, 12, 60, 70), points=((30, 40),)),
        MaskPrompt(box=(30, 5, 100, 90)), MaskPrompt(points=((60, 50),)), MaskPrompt(box=(5, 60, 50, 88)),
        MaskPrompt(points=((20, 80), (90, 10)), labels=(1, 1)))  # fmt: skip


def test_the_order_of_prompts_does_not_matter(segmenter: Segmenter) -> None:
    """Prompts with a box and without, of one point, of two and of none: four decoder calls, put in order again."""
    embedding = segmenter.encode([image()])[0]
    logits, iou = segmenter.decode(embedding, MANY)
    order = [3, 0, 5, 2, 4, 1]
    shuffled, scores = segmenter.decode(embedding, [MANY[i] for i in order])
    torch.testing.assert_close(shuffled, logits[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores, iou[order], atol=1e-5, rtol=1e-4)
    assert (logits[0] - logits[3]).abs().max() > 0.01  # they differ from one another


def test_several_points_with_labels_equal_sam2s_own_predictor(segmenter: Segmenter) -> None:
    """And a background point changes the mask, where the same point as foreground does not do the same."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(segmenter.model)
    side = segmenter.side
    predictor._bb_feat_sizes = [(side // n, side // n) for n in (4, 8, 16)]
    predictor.set_image(image())
    embedding = segmenter.encode([image()])[0]
    points = ((30.0, 40.0), (60.0, 50.0), (20.0, 80.0))
    found = []
    for labels in ((1, 0, 1), (1, 1, 1), (0, 1, 1)):
        expected, scores, _ = predictor.predict(
            point_coords=np.array(points), point_labels=np.array(labels), multimask_output=False, return_logits=True
        )
        logits, iou = segmenter.decode(embedding, [MaskPrompt(points=points, labels=labels)])
        full = torch.nn.functional.interpolate(logits[None], image().shape[:2], mode="bilinear", align_corners=False)
        np.testing.assert_allclose(full[0].numpy(), expected, atol=1e-4)
        np.testing.assert_allclose(iou.numpy(), scores, atol=1e-5)
        found.append(logits[0])
    (unlabelled,), _ = segmenter.decode(embedding, [MaskPrompt(points=points)])
    torch.testing.assert_close(unlabelled, found[1])  # without labels all are foreground
    assert (found[0] - found[1]).abs().max() > 0.01 and (found[0] - found[2]).abs().max() > 0.01


def test_agreement_is_the_iou_of_the_prompts_box_with_the_masks_own() -> None:
    """Logits of 4 x 4 over an image 80 px wide and 40 px high: a pixel of them is 20 x 10 px."""
    embedding = Embedding(maps=(), height=40, width=80)
    inner, corner, nothing = (torch.full((4, 4), -1.0) for _ in range(3))
    inner[1:3, 1:4] = 1.0  # rows 1 and 2, columns 1 to 3: (20, 10) to the right edge (80, 30)
    corner[3, 0] = corner[3, 1] = 1.0  # (0, 30) to (40, 40), at the bottom edge
    cases = [
        (inner, (20, 10, 80, 30), 1.0),
        (inner, (0, 10, 80, 30), 0.75),
        (inner, (20, 10, 50, 30), 0.5),
        (inner, (0, 0, 20, 10), 0.0),
        (corner, (0, 30, 40, 40), 1.0),
        (corner, (0, 20, 40, 40), 0.5),
        (nothing, (20, 10, 80, 30), 0.0),
        (inner, (np.nan,) * 4, 1.0),  # no box to agree with
        (nothing, (np.nan,) * 4, 1.0),
    ]
    logits, boxes = torch.stack([one for one, _, _ in cases]), np.array([box for _, box, _ in cases], float)
    assert _agreement(logits, boxes, embedding).tolist() == pytest.approx([value for _, _, value in cases])


def test_many_prompts_span_several_calls(segmenter: Segmenter) -> None:
    embedding = segmenter.encode([image()])[0]
    logits, _ = segmenter.decode(embedding, prompts(points=None)[:1] * 300)
    torch.testing.assert_close(logits[299], logits[0], atol=1e-4, rtol=1e-4)


def test_union_is_of_each_answers_own_masks(segmenter: Segmenter) -> None:
    embedding = segmenter.encode([image()])[0]
    each = segmenter.segment(embedding, prompts(), np.arange(3), 3)
    joint = segmenter.segment(embedding, prompts(), np.array([0, 2, 0]), 3)
    assert joint.masks.shape == (3, 90, 112)
    assert (joint.mask(0) == (each.mask(0) | each.mask(2))).all()
    assert (joint.mask(2) == each.mask(1)).all()
    assert not joint.mask(1).any() and joint.features[1].tolist() == [0, 0, 0]
    assert joint.features[0] == pytest.approx((each.features[0] + each.features[2]) / 2)


def test_nothing_to_segment_is_an_empty_mask(segmenter: Segmenter) -> None:
    embedding = segmenter.encode([image()])[0]
    empty = segmenter.segment(embedding, [], np.zeros(0, np.int64), 2)
    assert not empty.masks.any() and not empty.features.any()


def test_a_prompt_without_box_and_point_is_refused(segmenter: Segmenter) -> None:
    with pytest.raises(ValueError, match="box or a point"):
        segmenter.decode(segmenter.encode([image()])[0], [*prompts(), MaskPrompt()])


def test_overlaps_by_hand() -> None:
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[0, :2, :2] = True  # 4 pixels, 2 of them true
    masks[1, 0, :2] = True  # exactly the truth
    masks[2, 3, 3] = True  # misses
    truth = np.zeros((4, 4), bool)
    truth[0, :2] = True
    segmentation = Segmentation(masks, np.zeros(4))
    np.testing.assert_allclose(segmentation.overlaps(truth), [[0.5, 2 / 3], [1, 1], [0, 0], [0, 0]])
    nothing = segmentation.overlaps(np.zeros((4, 4), bool))
    np.testing.assert_allclose(nothing, [[0, 0], [0, 0], [0, 0], [1, 1]])


def test_cache_keeps_the_most_recent(segmenter: Segmenter) -> None:
    cached = Segmenter(segmenter.model, "cpu", capacity=2)
    seen = []

    def source(key: str) -> np.ndarray:
        seen.append(key)
        return image(ord(key))

    flags = [cached.embed(key, lambda key=key: source(key))[1] for key in "abacab"]  # type: ignore[misc]
    assert flags == [False, False, True, False, True, False]
    assert seen == ["a", "b", "c", "b"]


def test_bfloat16_agrees_with_float32(segmenter: Segmenter) -> None:
    torch.manual_seed(0)
    half = Segmenter(build(mini_config()), "cpu", torch.bfloat16)
    half.model.load_state_dict(segmenter.model.state_dict())
    exact, _ = segmenter.decode(segmenter.encode([image()])[0], prompts())
    rough, iou = half.decode(half.encode([image()])[0], prompts())
    assert rough.dtype == iou.dtype == torch.float32
    assert (exact - rough).abs().max() < 0.05 * exact.abs().max()


def test_hydra_is_left_as_it_was(tmp_path: Path) -> None:
    GlobalHydra.instance().clear()
    official_config("tiny")
    assert not GlobalHydra.instance().is_initialized()
    (tmp_path / "mine.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base=None):
        build(mini_config())
        assert compose("mine").a == 1


def test_a_configuration_cannot_name_foreign_code() -> None:
    config = mini_config()
    config.model.memory_encoder._target_ = "os.system"
    with pytest.raises(ValueError, match="not os"):
        build(config)


@pytest.mark.parametrize("name", ["tiny", "small", "base_plus", "large"])
def test_official_configurations_are_found(name: str) -> None:
    assert official_config(name).model.image_size == 1024


def test_unknown_names_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known: tiny, small"):
        Segmenter.load("random:huge")
    with pytest.raises(FileNotFoundError, match="yaml"):
        Segmenter.load(str(tmp_path))
    OmegaConf.save(mini_config(), tmp_path / "config.yaml")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        Segmenter.load(str(tmp_path))


def test_official_checkpoint_layout_loads(segmenter: Segmenter, tmp_path: Path) -> None:
    OmegaConf.save(mini_config(), tmp_path / "sam2.1_hiera_x.yaml")
    torch.save({"model": segmenter.model.state_dict()}, tmp_path / "sam2.1_hiera_x.pt")
    loaded = Segmenter.load(str(tmp_path))
    embedding = segmenter.encode([image()])[0]
    torch.testing.assert_close(loaded.decode(embedding, prompts()), segmenter.decode(embedding, prompts()))


def test_training_lowers_the_loss_and_reaches_every_used_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = [generate(seed) for seed in range(4)]
    train_tool(tmp_path, iter(scenes * 8), steps=8, batch=4, lr=3e-3, seed=0)
    lines = capsys.readouterr().out.splitlines()
    trained = Segmenter.load(str(tmp_path))
    assert [line.split("  ")[0] for line in lines] == ["128 px, step 4/4", "192 px, step 4/4"]
    assert (tmp_path / "model.safetensors").stat().st_size < 6e6
    torch.manual_seed(0)
    before = build(mini_config()).state_dict()
    after = trained.model.state_dict()
    for name in ("image_encoder.trunk.patch_embed.proj.weight", "sam_prompt_encoder.point_embeddings.2.weight"):
        assert not torch.allclose(before[name], after[name], atol=1e-3), name
