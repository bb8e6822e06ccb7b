"""python study/dataset.py PATH: its findings, prints, files and exit status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from models.skeleton import COCO, CROWDPOSE, Skeleton
from study.data.annotations import read_table
from study.data.survey import (
    annotation_files,
    crowd_indices,
    find_images,
    find_skeleton,
    measure,
    train_file_of,
)
from study.dataset import UNUSABLE, main
from study.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
GRAY = 128


def person(number: int, image: int, left: int = 20) -> dict[str, Any]:
    points = [(left + 2 * j, 20 + 4 * j, 1 + j % 2) for j in range(17)]
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "iscrowd": 0,
        "area": 3000,
        "bbox": [left - 5, 15, 45, 75],
        "num_keypoints": 17,
        "keypoints": sum(points, ()),
    }


def write_split(root: Path, split: str, first: int) -> Path:
    """Three gray images of two people each, in COCO's layout."""
    images = [
        {"id": i, "file_name": f"{i:012d}.jpg", "height": 100, "width": 120}
        for i in range(first, first + 3)
    ]
    (root / f"{split}2017").mkdir(parents=True)
    for image in images:
        pixels = np.full((100, 120, 3), GRAY, np.uint8)
        cv2.imwrite(str(root / f"{split}2017/{image['file_name']}"), pixels)
    people = [person(2 * i["id"] + k, i["id"], 20 + 40 * k) for i in images for k in (0, 1)]
    categories = [{"id": 1, "name": "person", "keypoints": list(COCO.joints)}]
    file = root / f"annotations/person_keypoints_{split}2017.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        json.dumps({"images": images, "annotations": people, "categories": categories})
    )
    return file


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A sound data set in COCO's layout, next to a file of captions."""
    root = tmp_path / "coco"
    write_split(root, "train", 1)
    write_split(root, "val", 11)
    (root / "annotations/captions_val2017.json").write_text("{}")
    return root


def run(*arguments: object) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code if isinstance(end.value.code, int) else 1


def change(file: Path, **changes: Any) -> None:
    document = json.loads(file.read_text())
    document["annotations"][0].update(changes)
    file.write_text(json.dumps(document))


def test_sound_folder_is_shown_and_written(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(coco, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.count("no faults") == 2 and "captions" not in printed
    assert "3, 3 with people" in printed and "left_shoulder" in printed
    assert pq.read_table(out / "audit.parquet").num_rows == 0
    people = pq.read_table(out / "people.parquet").to_pylist()
    assert len(people) == 12
    assert people[0] == {
        "annotations": str(coco / "annotations/person_keypoints_train2017.json"),
        "annotation_id": 2,
        "image_id": 1,
        "image": "000000000001.jpg",
        "x": 15,
        "y": 15,
        "width": 45,
        "height": 75,
        "area": 3000,
        "num_labeled": 17,
        "num_visible": 8,
        "crowd_index": people[0]["crowd_index"],
    }


def test_contact_sheet_has_the_skeletons_drawn(coco: Path, tmp_path: Path) -> None:
    assert run(coco, "--out", tmp_path / "out", "--sheet", 2) == 0
    for split in ("train", "val"):
        sheet = cv2.imread(str(tmp_path / f"out/person_keypoints_{split}2017.jpg"))
        assert sheet is not None and sheet.shape == (260, 520, 3)
        colorful = np.ptp(sheet.astype(int), axis=2) > 60
        left, right = colorful[:, :260].sum(), colorful[:, 260:].sum()
        assert left > 300 and right > 300  # gray images: color is limbs and joints
        scale, above = 256 / 120, 2 + (256 - round(100 * 256 / 120)) // 2
        x, y = 2 + round(22.5 * scale), above + round(24.5 * scale)  # the eye at 22, 24
        np.testing.assert_allclose(sheet[y, x], (90, 255, 90), atol=60)


def test_fault_is_listed_with_status_one(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(coco / "annotations/person_keypoints_val2017.json", bbox=[5, 5, 0, 9])
    (coco / "train2017/000000000002.jpg").write_bytes(b"torn")
    out = tmp_path / "out"
    assert run(coco, "--out", out) == 1
    printed = capsys.readouterr().out
    assert "box of zero size: 1" in printed and "image truncated or unreadable: 2" in printed
    rows = pq.read_table(out / "audit.parquet").to_pylist()
    assert [(row["annotation_id"], row["is_fault"]) for row in rows] == [
        (4, True),
        (5, True),
        (22, True),
    ]
    assert pq.read_table(out / "people.parquet").num_rows == 9
    assert (out / "person_keypoints_train2017.jpg").is_file()


def test_image_damaged_between_its_ends_is_left_off_the_sheet(coco: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3, 11):
        file = coco / f"{'val' if number == 11 else 'train'}2017/{number:012d}.jpg"
        whole = file.read_bytes()
        tables, frame = whole.index(b"\xff\xdb"), whole.index(b"\xff\xc0")
        file.write_bytes(whole[:tables] + whole[frame:])  # without tables it is no image
    run(coco, "--out", tmp_path / "out")
    assert not (tmp_path / "out/person_keypoints_train2017.jpg").exists()
    sheet = cv2.imread(str(tmp_path / "out/person_keypoints_val2017.jpg"))
    assert sheet is not None and sheet.shape[1] == 3 * 260  # two, and a blank


def test_names_that_are_no_text_are_surveyed(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff"))
    coco.rename(odd)
    (odd / "val2017/000000000011.jpg").unlink()
    assert run(odd, "--out", odd / "out") == 1
    assert "image missing: 2" in capsys.readouterr().out
    assert (odd / "out/person_keypoints_train2017.jpg").stat().st_size > 1000
    odd.rename(coco)
    rows = pq.read_table(coco / "out/audit.parquet").to_pylist()
    expected = f"{tmp_path}/odd\\udcff/val2017/000000000011.jpg"
    assert [row["file"] for row in rows] == [expected] * 2
    assert pq.read_table(coco / "out/people.parquet").num_rows == 10


@pytest.mark.parametrize("has_names", [True, False])
def test_short_people_are_faults_though_one_is_the_first(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], has_names: bool
) -> None:
    file = coco / "annotations/person_keypoints_train2017.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["keypoints"] = document["annotations"][0]["keypoints"][:45]
    if not has_names:
        del document["categories"][0]["keypoints"]
    file.write_text(json.dumps(document))
    assert find_skeleton(file) is COCO
    assert run(file, "--out", tmp_path / "out") == 1
    assert "keypoints of the wrong length: 1\n" in capsys.readouterr().out


def test_files_of_the_system_are_passed_over(coco: Path, tmp_path: Path) -> None:
    for place in ("annotations/._person_keypoints_val2017.json", "val2017/._000000000011.jpg"):
        (coco / place).write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    found = [file.name for file in annotation_files(coco)]
    assert found == ["person_keypoints_train2017.json", "person_keypoints_val2017.json"]
    (coco / "annotations/person_keypoints_val2017.json").rename(coco / "annotations/val.json")
    (coco / "annotations/person_keypoints_train2017.json").rename(coco / "annotations/train.json")
    (coco / "annotations/captions_val2017.json").unlink()
    (coco / "annotations/._val.json").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    assert [file.name for file in annotation_files(coco)] == ["train.json", "val.json"]
    assert run(coco, "--out", tmp_path / "out") == 0


def test_people_of_train_who_are_in_val_are_faults(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = coco / "annotations/person_keypoints_train2017.json"
    shutil.copy(train, coco / "annotations/person_keypoints_val2017.json")
    shutil.copytree(coco / "train2017", coco / "val2017", dirs_exist_ok=True)
    assert run(coco, "--out", tmp_path / "out", "--sheet", 0) == 1
    assert "person of train who is in val: 6" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out/audit.parquet").to_pylist()
    assert {row["kind"] for row in rows if row["is_fault"]} == {"person of train who is in val"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "valid JSON, got 'Expecting value' at line 1, column 13"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [], "annotations": []}', "must have 'keypoints', got none"),
        (
            '{"images": [], "annotations": [{"keypoints": [1, 2, 2]}]}',
            r"known skeleton, 17 (coco), 14 (crowdpose), got 1 joints",
        ),
    ],
)
def test_file_that_cannot_be_used_is_one_fault(
    coco: Path, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = coco / "annotations/person_keypoints_train2017.json"
    file.write_text(text)
    assert run(coco, "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().out
    (row,) = pq.read_table(tmp_path / "out/audit.parquet").to_pylist()
    assert (row["kind"], row["file"], row["image_id"]) == (UNUSABLE, str(file), None)
    assert pq.read_table(tmp_path / "out/people.parquet").num_rows == 6  # of val


def test_wrong_arguments_are_reported(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="must be a folder or an annotation file, got"):
        main([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"must hold annotation files .*got none in"):
        main([str(tmp_path / "empty")])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match=r"--out must be a folder that can be made, got .*file"):
        main([str(coco), "--out", str(tmp_path / "file")])
    assert run(coco, "--images", tmp_path / "nowhere") == 2
    assert run(coco, "--sheet", -1) == 2


def test_images_in_another_folder_need_the_option(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    shutil.move(coco / "annotations/person_keypoints_train2017.json", file)
    shutil.move(coco / "train2017", tmp_path / "deep/down")
    assert run(file, "--out", tmp_path / "out") == 1
    assert "give their folder by --images" in capsys.readouterr().out
    down = tmp_path / "deep/down"
    assert run(file, "--images", down, "--skeleton", "coco", "--out", tmp_path / "out") == 0


def test_images_with_equal_names_are_found_in_their_own_split(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_split(tmp_path, split, 1)
    for split in ("train", "val"):
        file = tmp_path / f"annotations/person_keypoints_{split}2017.json"
        assert find_images(read_table(file, COCO)) == tmp_path / f"{split}2017"
    shutil.move(tmp_path / "val2017", tmp_path / "images/val")
    shutil.move(tmp_path / "train2017", tmp_path / "images/train")
    shutil.move(tmp_path / "annotations/person_keypoints_val2017.json", tmp_path / "my_val.json")
    assert find_images(read_table(tmp_path / "my_val.json", COCO)) == tmp_path / "images/val"


def test_official_layouts_are_known(shared: Path, tmp_path: Path) -> None:
    files = annotation_files(shared / "data/coco_tiny")
    assert [file.stem[17:] for file in files] == ["train2017", "val2017", "val2017_det4"]
    assert find_images(read_table(files[0], COCO)).name == "train2017"
    (tmp_path / "json").mkdir()
    (tmp_path / "images").mkdir()
    for name in ("train", "val", "trainval"):
        source = shared / "data/crowdpose_tiny/annotations/crowdpose_sample.json"
        shutil.copy(source, tmp_path / f"json/crowdpose_{name}.json")
    for image in (shared / "data/crowdpose_tiny/images").iterdir():
        shutil.copy(image, tmp_path / "images")
    (tmp_path / "json/results.json").write_text("\n [1]")
    files = annotation_files(tmp_path)
    assert [file.name for file in files] == [
        f"crowdpose_{n}.json" for n in ("train", "trainval", "val")
    ]
    assert find_skeleton(files[0]) == CROWDPOSE
    assert find_images(read_table(files[0], CROWDPOSE)) == tmp_path / "images"
    assert [train_file_of(file, files) for file in files] == [None, None, files[0]]
    with pytest.raises(InputError, match="must have 'keypoints'"):
        (tmp_path / "a.json").write_text('{"images": [], "annotations": [{"id": 1}]}')
        find_skeleton(tmp_path / "a.json")


def test_figures_equal_those_counted_by_hand(coco: Path) -> None:
    file = coco / "annotations/person_keypoints_train2017.json"
    keypoints = [0] * 51
    keypoints[0:6] = [25, 20, 2, 30, 25, 1]
    change(file, keypoints=keypoints, num_keypoints=2, area=900)
    figures = measure(read_table(file, COCO), left_out={3})
    assert len(figures.rows) == 5 and figures.num_with_people == 3
    assert figures.labeled[0] == figures.labeled[1] == 1 and figures.labeled[2] == 4 / 5
    assert figures.visible[0] == 1 / 5 and figures.visible[1] == 4 / 5  # 1 + j % 2, but one
    assert figures.joints_per_person.tolist() == [0, 0, 1, *[0] * 14, 4]
    assert figures.sizes.tolist() == [1, 4, 0]
    assert figures.box_heights.tolist() == [75] * 5


def test_crowd_index_counts_others_joints_in_a_box(coco: Path) -> None:
    table = read_table(coco / "annotations/person_keypoints_train2017.json", COCO)
    # Boxes go from 15 to 60 and from 55 to 100; joints lie at 20 .. 52 and at 60 .. 92. The first
    # joint of the second (60) lies on the edge of the first's box; none the other way.
    index = crowd_indices(table, np.arange(6))
    np.testing.assert_allclose(index, [(1 / 17 + 0) / 2] * 3)
    np.testing.assert_allclose(crowd_indices(table, np.array([0, 2, 3])), [0, 1 / 34])


def test_crowd_index_correlates_with_that_of_the_official_file(shared: Path) -> None:
    file = shared / "data/crowdpose_tiny/annotations/crowdpose_val.json"
    figures = measure(read_table(file, CROWDPOSE))
    assert not figures.is_crowd_computed and figures.crowd_groups().sum() == 2000
    ours = crowd_indices(read_table(file, CROWDPOSE), figures.rows)
    assert np.corrcoef(ours, figures.crowd_indices)[0, 1] > 0.9
    assert np.abs(ours - figures.crowd_indices).mean() < 0.06


@pytest.mark.slow
def test_command_runs_from_any_folder_and_has_examples(coco: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "study/dataset.py")]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "examples:" in helped.stdout and "usage: dataset.py" in helped.stdout
    done = subprocess.run(
        [*command, str(coco)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "audit-coco/audit.parquet").is_file()


@pytest.mark.slow
def test_full_size_benchmark_runs_small(shared: Path, tmp_path: Path) -> None:
    script, source = ROOT / "tests/benchmarks/full_size.py", shared / "data/coco_tiny"
    command = [sys.executable, script, source, "--folder", tmp_path, "--people", "300"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in ("audit", "dataset.py", "prepare", "targets", "train"):
        assert step in done.stdout
    assert "people/s" in done.stdout and "GB are free" in done.stdout


@pytest.mark.parametrize("form", ["file", "from_data"])
def test_joints_of_one_s_own_are_surveyed_by_the_command(
    five: Skeleton, five_data: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "five.yaml"
    file.write_text(f"joints: [{', '.join(five.joints)}]")
    name = str(file) if form == "file" else form
    more = ["--images", str(five_data / "images"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main([str(five_data / "five.json"), *more, "--skeleton", name])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "no faults" in printed
    assert f"note: --skeleton={name}" in printed and "left_hand/right_hand" in printed
    assert "left_foot" in printed.partition("labeled, % of people")[2]
    with pytest.raises(SystemExit, match=r"--skeleton must be coco, crowdpose, from_data or a"):
        main([str(five_data / "five.json"), *more, "--skeleton", "five"])
