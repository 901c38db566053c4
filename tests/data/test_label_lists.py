"""Labels of a flat folder from a file that lies elsewhere, as ImageNet's validation images have."""

import corrupt_images as made
import pytest

from cjepa_fast.data.sources import open_images


@pytest.fixture
def opened(tmp_path):
    said = []

    def open_(path, **options):
        return open_images(path, cache=tmp_path / "cache", log=said.append, **options)

    open_.said = said
    return open_


FLAT = ("a.jpg", "b b.jpg", "c.png", "d.jpg")


def flat(root):
    """ImageNet's val in small: a flat folder, one file of which is no image."""
    for name in FLAT:
        data = b"no image" if name == "c.png" else made.encoded(made.picture(len(name)))
        made.write(root / name, data)
    return root


@pytest.mark.parametrize(("file", "text", "expected"), [
    ("l.txt", "a.jpg 2\nb b.jpg 0\nc.png 9\nd.jpg\t1\n", [2, 0, 1]),
    ("l.txt", "d.jpg dog\na.jpg cat\nb b.jpg dog\n", ["cat", "dog", "dog"]),
    ("l.csv", "path,label\nd,a dog\na,a cat\nb b,a dog\n", ["a cat", "a dog", "a dog"]),
    ("l.csv", "id,width,class\nd,9,a dog\na,8,a cat\nb b,7,a dog\n", ["a cat", "a dog", "a dog"]),
    ("l.csv", "a,class\nd,dog\nb b,dog\n", ["class", "dog", "dog"]),  # that is an image
    ("l.txt", "7\n3\n0\n5\n", [7, 3, 5]),  # in the order of the files, the unusable one too
    ("l.txt", "# of val\nn07\nn03\nn00\nn07\n\n", ["n07", "n03", "n07"]),
    ("l.csv", "golden retriever\ntabby cat\nx\ntabby cat\n",
     ["golden retriever", "tabby cat", "tabby cat"]),
    ("l.txt", "sea lion\nsea otter\nx\nsea lion\n", ["sea lion", "sea otter", "sea lion"]),
])  # fmt: skip
def test_labels_from_a_file_elsewhere(tmp_path, opened, file, text, expected):
    made.write(tmp_path / "elsewhere" / file, text.encode())
    images = opened(flat(tmp_path / "val"), label_list=tmp_path / "elsewhere" / file)
    labels = images.labels.tolist()
    assert [images.name(i) for i in range(3)] == [name for name in FLAT if name != "c.png"]
    assert [images.classes[k] for k in labels] if images.classes else labels == expected
    assert opened(tmp_path / "val").labels is None  # nothing of it is remembered


def test_labels_from_a_file_that_fits_in_part(tmp_path, opened):
    made.write(tmp_path / "l.txt", b"a.jpg 0\nd.jpg 1\ngone.jpg 2\nfar.jpg 2\n")
    images = opened(flat(tmp_path / "val"), label_list=tmp_path / "l.txt", labelled=True)
    assert images.labels.tolist() == [0, 1] and ("b b.jpg", "no label") in images.skipped
    assert [
        line for line in opened.said if "2 lines name no image of the set, such as gone.jpg" in line
    ]
    made.write(tmp_path / "classes.txt", b"cat\ndog\ncow\n")
    assert (
        opened(tmp_path / "val", label_list=tmp_path / "l.txt", labelled=True).classes[1] == "dog"
    )


@pytest.mark.parametrize(("file", "text", "says"), [
    ("l.txt", "1\n2\n3\n", "names none of the 4 images, and has 3 lines"),
    ("l.txt", "x.jpg 1\ny.jpg 2\n", "names none of the 4 images, and has 2 lines"),
    ("l.txt", "a.jpg 1\na.jpg 2\n", "line 2: another label of a.jpg"),
    # As many lines as images, of other images: they are no labels.
    ("l.csv", "v/a,cat\nv/b b,dog\nv/c,dog\nv/d,cat\n", "first image's: v/a; a.jpg"),
    ("l.txt", "v/a cat\nv/b dog\nv/c dog\nv/d cat\n", "first image's: v/a; a.jpg"),
    ("l.txt", "v/a.jpg\nv/b.jpg\nv/c.png\nv/d.jpg\n", "first image's: v/a.jpg; a.jpg"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_refused(tmp_path, opened, file, text, says):
    made.write(tmp_path / file, text.encode())
    with pytest.raises(ValueError, match=says):
        opened(flat(tmp_path / "val"), label_list=tmp_path / file)
