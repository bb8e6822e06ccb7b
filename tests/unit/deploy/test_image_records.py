"""Which image of a file each image of the user is; no two images are one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from study.data.coco_results import ResultFile
from study.deploy.image_records import match_images
from study.deploy.inputs import GivenImage
from study.errors import InputError

FILE = Path("boxes.json")


def images(*names: str, folder: str = "/data/photos") -> list[GivenImage]:
    """Images of a given folder."""
    return [GivenImage(Path(folder, name), name) for name in names]


def ids(results: ResultFile, given: list[GivenImage]) -> dict[str, int]:
    return {image.name: record.id for image, record in match_images(results, given).items()}


def annotations(*names: str | tuple[int, str], **changes: Any) -> ResultFile:
    """An annotation file with these images, numbered from 11 on unless they have an id."""
    named = [(n, name) if isinstance(name, str) else name for n, name in enumerate(names, 11)]
    records = [{"id": number, "file_name": name, **changes} for number, name in named]
    return ResultFile(FILE, [], {"images": records, "annotations": []})


def listed(*entries: int | tuple[int, str]) -> ResultFile:
    """A result list with these image_ids, and file_names if there are any."""
    pairs = [(entry, None) if isinstance(entry, int) else entry for entry in entries]
    named: list[Any] = [
        {"image_id": number} | ({} if name is None else {"file_name": name})
        for number, name in pairs
    ]
    return ResultFile(FILE, named, None)


def test_results_are_matched_by_the_number_that_a_name_ends_in() -> None:
    given = images("000000000785.jpg", "cam1_0001.jpg", "none.jpg")
    assert ids(listed(785, 1, 99, 1), given) == {"000000000785.jpg": 785, "cam1_0001.jpg": 1}


@pytest.mark.parametrize(
    ("first", "second"),
    [("cam1_0001.jpg", "cam2_0001.jpg"), ("cam1_0001.jpg", "cam2_1.png"), ("a/1.jpg", "b/1.jpg")],
)
def test_two_images_that_end_in_one_number_are_refused(first: str, second: str) -> None:
    given = images(first, second)
    for results in (listed(1), ResultFile(FILE, [{"image_id": 1}], {"annotations": []})):
        with pytest.raises(InputError, match=rf"got 1, which .*{first} and .*{second} both end"):
            match_images(results, given)
    assert ids(listed(2), given) == {}


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (0, 2), (0,)])
def test_ids_that_count_images_from_0_are_refused(numbers: tuple[int, ...]) -> None:
    given = images("frame_0001.jpg", "frame_0002.jpg", "frame_0003.jpg", "frame_0004.jpg")
    message = r"must be the number .* got 0.* for images from number 1 on, which seem to count"
    for results in (listed(*numbers), ResultFile(FILE, listed(*numbers).entries, {"images": []})):
        with pytest.raises(InputError, match=message):
            match_images(results, given)


def test_every_tenth_frame_may_be_counted_from_0_too() -> None:
    given = images("1.jpg", "11.jpg", "21.jpg")
    for numbers in ((0, 10, 20), (0, 1, 2)):
        with pytest.raises(InputError, match="seem to count from 0"):
            match_images(listed(*numbers), given)


def test_id_0_is_an_image_of_number_0_or_of_another_set(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ids(listed(0, 1), images("0.jpg", "1.jpg")) == {"0.jpg": 0, "1.jpg": 1}
    assert capsys.readouterr().err == ""
    assert ids(listed(0, 1, 7, 7), images("1.jpg", "2.jpg")) == {"1.jpg": 1}
    assert "3 of 4 entries of boxes.json are of none of the images" in capsys.readouterr().err


def test_entries_of_no_image_are_counted_with_their_first_ids(
    capsys: pytest.CaptureFixture[str],
) -> None:
    match_images(listed(1, 30, 9, 30, 2), images("1.jpg", "2.jpg"))
    assert "3 of 5 entries of boxes.json are of none of the images by their image_id (9, 30)" in (
        capsys.readouterr().err
    )
    unlisted = annotations((1, "1.jpg"), (2, "2.jpg"))
    unlisted.entries.extend({"image_id": number} for number in (1, 2, 5))
    match_images(unlisted, images("1.jpg"))  # image 2 is not given, image 5 does not exist
    assert "1 of 3 entries of boxes.json" in capsys.readouterr().err


def test_results_that_name_their_images_are_matched_by_the_names() -> None:
    """As predict.py writes them: ids are places in the list if names have no numbers."""
    given = images("a_2.jpg", "b.jpg", "cam1_0001.jpg", "cam2_0001.jpg")
    results = listed((1, "a_2.jpg"), (2, "b.jpg"), (2, "b.jpg"), (4, "cam2_0001.jpg"))
    assert ids(results, given) == {"a_2.jpg": 1, "b.jpg": 2, "cam2_0001.jpg": 4}


def test_images_of_one_name_are_told_apart_by_their_folders() -> None:
    given = images("a/1.jpg", "b/1.jpg", "c/1.jpg")
    assert ids(annotations("b/1.jpg", "a/1.jpg"), given) == {"a/1.jpg": 12, "b/1.jpg": 11}
    assert ids(listed((5, "b/1.jpg")), given) == {"b/1.jpg": 5}
    # The folder is part of the path, even if the user gives the folder.
    alone = images("1.jpg", folder="/data/photos/b")
    assert ids(annotations("a/1.jpg", "b/1.jpg", "1.jpg"), alone) == {"1.jpg": 12}
    # Names from Windows, and in either form of Unicode.
    given = images("a/\N{LATIN SMALL LETTER E WITH ACUTE}.jpg")
    assert list(ids(annotations("b\\e\u0301.jpg", "a\\e\u0301.jpg"), given).values()) == [12]


def test_plain_name_is_the_image_at_the_top_of_the_folder() -> None:
    assert ids(annotations("1.jpg"), images("a/1.jpg", "1.jpg")) == {"1.jpg": 11}
    assert ids(annotations("1.jpg"), images("a/1.jpg")) == {"a/1.jpg": 11}
    with pytest.raises(InputError, match=r"got 1\.jpg for .*a/1\.jpg and .*b/1\.jpg; give one"):
        match_images(annotations("1.jpg"), images("a/1.jpg", "b/1.jpg"))


def test_image_in_another_folder_is_matched_by_its_name_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ids(annotations("val/1.jpg", "2.jpg"), images("1.jpg", "2.jpg")) == {
        "1.jpg": 11,
        "2.jpg": 12,
    }
    assert "names val/1.jpg, which is taken for /data/photos/1.jpg" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"1\.jpg for the images \['a/1\.jpg', 'b/1\.jpg'\]"):
        match_images(annotations("a/1.jpg", "b/1.jpg"), images("1.jpg"))
    with pytest.raises(InputError, match=r"got a/1\.jpg for .*c/1\.jpg and .*d/1\.jpg"):
        match_images(annotations("a/1.jpg"), images("c/1.jpg", "d/1.jpg"))


def test_file_that_names_an_image_twice_or_has_an_id_twice_is_refused() -> None:
    with pytest.raises(InputError, match=r"got 1\.jpg for the ids \[11, 12\]"):
        match_images(annotations("1.jpg", "1.jpg"), images("1.jpg"))
    assert ids(annotations((3, "1.jpg"), (3, "1.jpg")), images("1.jpg")) == {"1.jpg": 3}
    for results in (annotations((3, "1.jpg"), (3, "2.jpg")), listed((3, "1.jpg"), (3, "2.jpg"))):
        with pytest.raises(InputError, match=r"got id 3 for 1\.jpg, 2\.jpg; change the ids"):
            match_images(results, images("1.jpg"))
        assert ids(results, images("5.jpg")) == {}


def test_size_of_the_record_is_kept() -> None:
    (image,) = images("1.jpg")
    for record, size in (
        ({"height": 4, "width": 3.0}, (4, 3)),
        ({"height": None}, (0, 0)),
        ({}, (0, 0)),
    ):
        assert match_images(annotations("1.jpg", **record), [image])[image].size == size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": [1]}, r"image 0 \(from 0\): id must be a whole number, got \[1\]"),
        ({"id": True}, "id must be a whole number, got True"),
        ({"id": 1.5}, r"id must be a whole number, got 1\.5"),
        ({"id": 2**63}, "id must be a whole number"),
        ({"file_name": None}, "file_name must be text, got None"),
        ({"file_name": ["1.jpg"]}, r"file_name must be text, got \['1\.jpg'\]"),
        ({"file_name": ""}, "file_name must be text, got ''"),
        ({"width": "640"}, "width must be a number of pixels, got '640'"),
        ({"height": float("nan")}, "height must be a number of pixels, got nan"),
        ({"height": [5]}, r"height must be a number of pixels, got \[5\]"),
    ],
)
def test_broken_record_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"boxes\.json, .*{message}"):
        match_images(annotations("1.jpg", **changes), images("1.jpg"))


def test_file_without_proper_names_is_refused() -> None:
    with pytest.raises(InputError, match=r"'images' of .* must be a list, got \{'a': 1\}"):
        match_images(ResultFile(FILE, [], {"images": {"a": 1}}), images("1.jpg"))
    with pytest.raises(InputError, match=r"image 0 \(from 0\): must be an object, got 5"):
        match_images(ResultFile(FILE, [], {"images": [5]}), images("1.jpg"))
    for name in (None, 5, ["1.jpg"]):
        mixed = ResultFile(
            FILE, [{"image_id": 1, "file_name": "1.jpg"}, {"image_id": 2, "file_name": name}], None
        )
        with pytest.raises(InputError, match=r"entry 1 \(from 0\): must have the file_name"):
            match_images(mixed, images("1.jpg"))
    with pytest.raises(InputError, match=r"entry 1 \(from 0\): must have the file_name"):
        match_images(listed((1, "1.jpg"), 2), images("1.jpg"))
