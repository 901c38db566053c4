"""COCO's format: what is read of it, what is refused, and views that keep picture, mask and box
together."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import rectangles
import torch
from PIL import Image

from cjepa_fast.data.sets.coco import (
    Coco,
    TrainViews,
    ValImages,
    View,
    check_same_classes,
    jittered,
)

mask_tools = pytest.importorskip("pycocotools.mask", reason="pycocotools is an extra (detect)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rectangles.write(tmp_path_factory.mktemp("coco"), "train", count=4)


def opened(folder: Path, split: str = "train") -> Coco:
    return Coco(folder / "annotations" / f"instances_{split}.json", folder / split)


def changed(folder: Path, change) -> Path:
    """The set's annotations with `change` made to them, as another file beside them."""
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    change(content)
    path = folder / "annotations" / "instances_other.json"
    path.write_text(json.dumps(content))
    return path


def test_polygons_and_both_kinds_of_rle_are_the_same_mask(folder):
    coco = opened(folder)
    first = coco.objects(0)[0]  # uncompressed RLE
    x, y, w, h = first["bbox"]
    height, width = first["segmentation"]["size"]
    compressed = mask_tools.frPyObjects(first["segmentation"], height, width)
    forms = [first["segmentation"], rectangles.polygon(x, y, w, h), compressed]
    masks = coco.masks([{**first, "segmentation": form} for form in forms])
    expected = np.zeros((height, width), dtype=np.uint8)
    expected[y : y + h, x : x + w] = 1
    assert (masks == expected).all()


def test_labels_count_from_one_in_the_order_of_the_ids(folder):
    coco = opened(folder)
    assert coco.names == ["red", "blue"] and coco.label == {3: 1, 7: 2}
    assert coco.unmasked is None


def test_a_crowd_is_kept_for_scoring_and_not_learnt_from(folder):
    def crowd(content):
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"][1]["bbox"][2] = 0

    coco = Coco(changed(folder, crowd), folder / "train")
    assert len(coco.objects(0)) == 2 and coco.single_objects(0) == []


def test_a_view_keeps_picture_mask_box_and_label_together(folder, seed):
    """Inside a mask there is the colour of its label, as far as its box and no further."""
    coco, seen, mirrored = opened(folder), 0, set()
    for epoch in range(12):
        views = TrainViews(coco, [0, 1, 2, 3], canvas=96, seed=seed, epoch=epoch)
        for i in range(4):
            picture, target = views[i]
            assert max(picture.shape[1:]) <= 96
            for box, label, mask in zip(*(target[k] for k in ("boxes", "labels", "masks")),
                                        strict=True):  # fmt: skip
                rows, columns = mask.nonzero().unbind(1)
                ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box.tolist() == [float(x) for x in ends]
                if mask.sum() < 100:
                    continue  # too small to look at its middle
                colour = picture[:, mask.bool()].float().mean(1)
                assert colour.argmax() == {1: 0, 2: 2}[int(label)] and colour.max() > 180
                seen += 1
        mirrored |= {u[3] < 0.5 for u in views.draw_n4}
    assert seen > 30 and mirrored == {True, False}


def test_boxes_follow_the_window_and_the_mirror():
    view = View(left=10, top=0, width=20, height=40, size=(40, 80), mirrored=False)
    boxes = np.array([[12.0, 5, 6, 10], [0, 0, 100, 100]])
    assert view.boxes(boxes).tolist() == [[4, 10, 16, 30], [0, 0, 40, 80]]
    assert view._replace(mirrored=True).boxes(boxes)[0].tolist() == [24, 10, 36, 30]


def test_jitter_spans_its_scales_and_is_drawn_anew_each_epoch(folder):
    small = jittered((200, 100), 64, [0.0, 0.5, 0.5, 0.9])
    assert small.size == (6, 3) and (small.width, small.height) == (200, 100)
    large = jittered((200, 100), 64, [1.0, 1.0, 0.0, 0.9])  # scaled to 128 x 64
    assert large.size == (64, 64) and large[:4] == (100, 0, 100, 100)
    coco = opened(folder)
    draws = [TrainViews(coco, [0, 1], 64, 5, epoch).draw_n4 for epoch in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_rotated_photograph_is_set_upright(folder, tmp_path):
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    content = {"images": [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 30}],
               "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}],
               "categories": [{"id": 1, "name": "x"}]}  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(content))
    picture, _ = ValImages(Coco(tmp_path / "x.json", tmp_path), [0])[0]
    assert picture.shape == (3, 30, 20)


def test_a_picture_of_sixteen_bits_is_scaled_and_not_clipped(tmp_path):
    levels = np.tile(np.linspace(0, 2**16 - 1, 30, dtype=np.uint16), (20, 1))
    Image.fromarray(levels).save(tmp_path / "a.png")
    content = {"images": [{"id": 1, "file_name": "a.png", "width": 30, "height": 20}],
               "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}],
               "categories": [{"id": 1, "name": "x"}]}  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(content))
    shown = np.asarray(Coco(tmp_path / "x.json", tmp_path).picture(0))
    np.testing.assert_array_equal(shown[0, :, 0], np.round(levels[0] / 257))


WRONG = {
    "missing: .*names it, image 101": lambda c: c["images"][1].update(file_name="gone.png"),
    "annotation 0 has the category_id 9": lambda c: c["annotations"][0].update(category_id=9),
    "annotation 1 has the image_id 7": lambda c: c["annotations"][1].update(image_id=7),
    "its images are empty": lambda c: c.update(images=[]),
    "its annotations are empty": lambda c: c.update(annotations=[]),
    "no list 'categories'": lambda c: c.pop("categories"),
    r"annotations\[1\] has no 'bbox'": lambda c: c["annotations"][1].pop("bbox"),
    "two of its images have the id 100": lambda c: c["images"][1].update(id=100),
    "annotation 0 has the bbox": lambda c: c["annotations"][0].update(bbox=[1, 2, 3, None]),
    "annotation 1 has a polygon": lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3, 4]]),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_is_named(folder, said):
    path = changed(folder, WRONG[said])
    with pytest.raises(ValueError, match=said) as raised:
        Coco(path, folder / "train")
    assert "instances_other.json" in str(raised.value)


def test_a_picture_of_another_size_or_none_is_named(folder, tmp_path):
    coco = Coco(changed(folder, lambda c: c["images"][0].update(width=57)), folder / "train")
    with pytest.raises(
        ValueError, match=r"000\.png has 56 x 40 pixels.*says 57 x 40 \(image 100\)"
    ):
        coco.picture(0)
    (tmp_path / "000.png").write_text("text")
    coco.folder = tmp_path
    with pytest.raises(ValueError, match=r"000\.png cannot be read"):
        coco.picture(0)


def test_other_classes_in_the_other_split_are_refused(folder):
    other = Coco(changed(folder, lambda c: c["categories"][0].update(name="x")), folder / "train")
    with pytest.raises(ValueError, match="do not have the same categories"):
        check_same_classes(opened(folder), other)


@pytest.mark.parametrize("name", ["coco_sample/test_coco", "voc_style_sample/coco_annotations"])
def test_real_annotations(name):
    if not (real := os.environ.get("CJEPA_REAL_DENSE")):
        pytest.skip("CJEPA_REAL_DENSE names no folder of real images with labels for each pixel")
    folder = Path(real) / "misc" / Path(name).parent
    coco = Coco(folder / f"{Path(name).name}.json", folder)
    for i in range(len(coco)):
        picture = coco.picture(i)
        everything = View(0, 0, *picture.size, picture.size, mirrored=False)
        for a, mask in zip(coco.objects(i), coco.masks(coco.objects(i)), strict=True):
            rows, columns = np.nonzero(everything.masks(mask[None])[0])
            ends = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            box = everything.boxes(np.array([a["bbox"]]))[0]
            assert np.abs(box - ends).max() <= 2  # pixels: the annotators' box and their outline
    picture, target = TrainViews(coco, list(range(len(coco))), 256, 0, 0)[0]
    assert picture.dtype == torch.uint8 and len(target["boxes"]) == len(target["masks"])
