"""Check and survey a data set before training: ``python study/dataset.py PATH``.

Runs a study's audit without the study, and shows what the data contain.
"""

import os
import signal
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
if os.path.isfile(os.path.join(HERE, "__init__.py")):
    # In a checkout, replace study/ on the path by the root: names of its files would hide others.
    sys.path[0] = os.path.dirname(HERE)
import study  # noqa: F401  (checks the working folder before torch is imported)

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the packages load

import argparse
import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.markup import escape

from models.skeleton import SKELETONS, Skeleton
from study.config.schema import FROM_DATA
from study.config.typed_paths import typed_path
from study.data.annotations import AnnotationTable, read_table
from study.data.audit import (
    Fault,
    audit,
    describe,
    faulty_ids,
    printable,
    write_audit,
    write_parquet,
)
from study.data.audit_notes import IN_FULL, find_notes
from study.data.image_files import TURNED_IMAGE
from study.data.own_skeletons import skeleton_from_data
from study.data.people import People, build_people, overlap
from study.data.shared_people import SharedPerson, shared_people
from study.data.skeleton_file import read_skeleton
from study.data.survey import (
    Figures,
    annotation_files,
    bars_table,
    counts_table,
    draw_sheet,
    find_images,
    find_skeleton,
    joints_table,
    measure,
    train_file_of,
)
from study.display import Display, escape_unprintable
from study.errors import InputError
from study.interrupts import ends_in_one_line

FAULTS, PEOPLE, SHARED = "audit.parquet", "people.parquet", "shared.parquet"
UNUSABLE = "annotation file that cannot be used"
COLUMNS = 6
"""Images in a row of the contact sheet."""
REASONS = 5
"""Reasons that a comparison prints, with an example of each."""
Meter = Callable[[str], Callable[[int, int], None]]
EXPLANATION = """\
PATH is the folder of a data set, or one annotation file in the format of COCO or CrowdPose.
These layouts are known:
  coco/       annotations/person_keypoints_{train,val}2017.json   train2017/ val2017/
  crowdpose/  json/crowdpose_{train,val,test}.json                images/
In other layouts the images are searched in the folders near the annotation file.

prints the faults of the data and what the data contain: people, labeled joints, sizes, crowding
and writes to FOLDER:
  audit.parquet    one row per fault (is_fault) or note, with its file, image_id, annotation_id
  people.parquet   one row per person that a study would use
  <file>.jpg       contact sheet: images of that annotation file with the people's skeletons drawn.
                   Left limbs are orange, right limbs blue, hidden joints are rings. Check that
                   each joint is where its name says.

--compare A B lists the people of annotation file A who are in B, and those whose image is: by ids
and boxes, and by the content of the images, whatever their names, formats and sizes are. It writes
shared.parquet, one row per person of A.

A fault stops a study, unless data.max_bad_fraction allows that many people to be left out. A note
stops nothing: official files have crowd regions, people without joints, joints a little outside.

exit status: 1 if there is a fault, or with --compare a person in both files; otherwise 0

examples:
  python study/dataset.py /data/coco
  python study/dataset.py /data/crowdpose/json/crowdpose_train.json --out look
  python study/dataset.py --compare mine_train.json mine_val.json
  python study/dataset.py mine.json --images images --skeleton coco
  python study/dataset.py horses.json --skeleton horse.yaml
"""


@dataclasses.dataclass(frozen=True)
class Usable:
    """A file that a study could use: at least one of its people has no fault."""

    table: AnnotationTable
    image_folder: Path
    left_out: frozenset[int]
    """Ids of the annotations with faults."""
    figures: Figures


@dataclasses.dataclass(frozen=True)
class Survey:
    """Results of checking one annotation file."""

    annotations: Path
    faults: list[Fault]
    """Notes among them."""
    usable: Usable | None = None


def survey(
    annotations: Path,
    image_folder: Path | None,
    skeleton_of: Callable[[Path], Skeleton],
    category: str | None,
    progress: Callable[[int, int], None],
) -> Survey:
    """Check a file and measure it; a file that cannot be read has one fault.

    Args:
        image_folder: folder of the images; None: found near the file.
        skeleton_of: returns the skeleton of the joints in an annotation file.
        category: name of the people's category; None: found.
    """
    try:
        table = read_table(annotations, skeleton_of(annotations), category)
        image_folder = image_folder or find_images(table)
        faults = audit(table, image_folder, progress=progress)
    except InputError as error:
        return Survey(annotations, [Fault(UNUSABLE, annotations, None, None, str(error))])
    left_out = faulty_ids(faults)
    is_sound = table.is_used & ~np.isin(table.ids, list(left_out))
    usable = None
    if is_sound.any():
        usable = Usable(table, image_folder, left_out, measure(table, left_out))
    return Survey(annotations, faults + find_notes(table), usable)


def _skeletons(
    name: str | None, category: str | None, notify: Callable[[str], None]
) -> Callable[[Path], Skeleton]:
    """Return the function that finds the skeleton of an annotation file.

    Args:
        name: as --skeleton; None finds it by names, otherwise by number.
        category: as --category.

    Raises:
        InputError: ``name`` is neither a skeleton's nor that of a skeleton file.
    """
    if name is None:
        return lambda file: find_skeleton(file, category)
    if name == FROM_DATA:
        return lambda file: skeleton_from_data(file, category, "--skeleton", notify)
    if name in SKELETONS:
        skeleton = SKELETONS[name]
    elif name.endswith((".yaml", ".yml")):
        skeleton = read_skeleton(typed_path(name), "--skeleton", notify)
    else:
        raise InputError(
            f"--skeleton must be {', '.join(SKELETONS)}, {FROM_DATA} or a .yaml file, got {name}"
        )
    return lambda file: skeleton


def leaks(surveys: Sequence[Survey]) -> list[Fault]:
    """List the people of each training file who are in the validation file beside it."""
    usable = {one.annotations: one.usable for one in surveys if one.usable is not None}
    found: list[Fault] = []
    for file, val in usable.items():
        train = usable.get(train_file_of(file, usable) or Path())
        if train is None or {*train.table.skeleton.joints} != {*val.table.skeleton.joints}:
            continue
        try:
            train_people, val_people = (
                build_people(one.table, one.image_folder, leave_out=one.left_out)
                for one in (train, val)
            )
        except InputError:  # a fault of the file as a whole, which is listed already
            continue
        found += overlap(train_people, val_people)
    return found


def write_people(file: Path, surveys: Iterable[Survey]) -> bool:
    """Write one row for each person that a study would use; return whether there is one."""
    parts = [_people_rows(one.usable) for one in surveys if one.usable is not None]
    if parts:
        write_parquet(file, pa.concat_tables(parts).unify_dictionaries())
    return bool(parts)


def _people_rows(one: Usable) -> pa.Table:
    table, rows, figures = one.table, one.figures.rows, one.figures
    places = np.searchsorted(figures.image_rows, table.image_rows[rows])
    visibility = table.keypoints[rows, :, 2]
    x, y, width, height = table.boxes[rows].T
    columns = {
        "annotations": pa.array([printable(str(table.path))] * len(rows)).dictionary_encode(),
        "annotation_id": table.ids[rows],
        "image_id": table.image_ids[rows],
        "image": [table.images.names[row] for row in table.image_rows[rows]],
        "x": x,
        "y": y,
        "width": width,
        "height": height,
        "area": table.areas[rows],
        "num_labeled": (visibility > 0).sum(axis=1),
        "num_visible": (visibility == 2).sum(axis=1),
        "crowd_index": figures.crowd_indices[places],
    }
    return pa.table(columns)


def write_sheet(file: Path, one: Usable, num_images: int) -> bool:
    """Draw a sample of images, evenly spaced in the file, with the joints of their people.

    Returns:
        Whether a sheet was written: False if none of the images could be decoded.
    """
    table, rows = one.table, one.figures.image_rows
    paths: list[Path] = []
    people: list[list[list[float]]] = []
    for row in rows[np.linspace(0, len(rows) - 1, min(num_images, len(rows))).astype(int)]:
        shown = one.figures.rows[table.image_rows[one.figures.rows] == row]
        paths.append(one.image_folder / table.images.names[row])
        people.append(table.keypoints[shown].reshape(len(shown), -1).tolist())
    return draw_sheet(paths, people, file, min(COLUMNS, len(paths)), table.skeleton)


def show(one: Survey, console: Console) -> None:
    """Print the figures of a file, its faults and its notes."""
    console.rule(f"[bold]{escape(one.annotations.name)}", align="left")
    if one.usable is not None:
        figures, skeleton = one.usable.figures, one.usable.table.skeleton
        console.print(
            f"images in {one.usable.image_folder}, joints of {skeleton.name}",
            markup=False,
            soft_wrap=True,
        )
        console.print(counts_table(figures), bars_table(figures))
        console.print(joints_table(figures, skeleton))
    for note in one.faults:
        if note.kind in IN_FULL and note.is_warning and note.annotation_id is None:
            console.print(f"{note.kind}: {note.detail}", markup=False, soft_wrap=True)
    turned = [fault for fault in one.faults if fault.kind == TURNED_IMAGE]
    if turned:
        console.print(f"notes\n{describe(turned)}", markup=False, soft_wrap=True)
    faults = [fault for fault in one.faults if not fault.is_warning]
    if faults:
        console.print("[bold red]faults")
        console.print(describe(faults), markup=False, soft_wrap=True)
    else:
        console.print("[green]no faults")
    notes = collections.Counter(fault.kind for fault in one.faults if fault.is_warning)
    if notes:
        listed = ", ".join(f"{kind} ({count})" for kind, count in notes.most_common())
        console.print(f"notes, which stop nothing: {listed}", markup=False, soft_wrap=True)


def shared_table(ours: People, theirs: People, shared: Sequence[SharedPerson]) -> pa.Table:
    """Return the list as a table, a row per person."""
    rows = [one.row for one in shared]
    others = [one.other_row for one in shared]
    ids = [None if row is None else int(theirs.annotation_ids[row]) for row in others]
    columns = {
        "annotation_id": pa.array(ours.annotation_ids[rows].tolist(), pa.int64()),
        "image_id": pa.array(ours.image_ids[rows].tolist(), pa.int64()),
        "image": pa.array([printable(str(ours.image_paths[row])) for row in rows], pa.string()),
        "reason": pa.array([one.reason for one in shared], pa.string()),
        "other_annotation_id": pa.array(ids, pa.int64()),
        "other_image": pa.array([printable(str(one.other_image)) for one in shared], pa.string()),
    }
    return pa.table(columns)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="dataset.py",
        description="Check a data set before training on it, and show what it contains.",
        epilog=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path",
        type=typed_path,
        metavar="PATH",
        nargs="?",
        help="folder of a data set, or an annotation file",
    )
    parser.add_argument(
        "--compare",
        type=typed_path,
        nargs=2,
        metavar=("A", "B"),
        help="list the people of annotation file A who are in B, in place of checking PATH",
    )
    parser.add_argument(
        "--images",
        type=typed_path,
        metavar="FOLDER",
        help="folder of the images (default: found near the annotation file)",
    )
    parser.add_argument(
        "--skeleton",
        metavar="NAME",
        help=f"joints of the annotations: {', '.join(SKELETONS)}, {FROM_DATA} (named by "
        "the file's category) or a YAML file (default: by their names, otherwise by their number)",
    )
    parser.add_argument(
        "--category",
        metavar="NAME",
        help="category of the people (default: the one with joints)",
    )
    parser.add_argument(
        "--out",
        type=typed_path,
        metavar="FOLDER",
        help="folder to write to (default: audit-<name of PATH>, compare-<A>-<B>)",
    )
    parser.add_argument(
        "--sheet",
        type=int,
        default=24,
        metavar="N",
        help="images on a contact sheet (default: 24; 0: no sheet)",
    )
    # The option's former name.
    parser.add_argument(
        "--pictures", dest="sheet", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    options = parser.parse_args(arguments)
    if (options.path is None) == (options.compare is None):
        parser.error("give either PATH or --compare A B")
    for file in options.compare or []:
        if not file.is_file():
            kind = "a folder" if file.is_dir() else "no such file"
            parser.error(f"--compare takes two annotation files, got {kind}: {file}")
    if options.sheet < 0:
        parser.error(f"--sheet must be at least 0, got {options.sheet}")
    if options.images is not None and not options.images.is_dir():
        parser.error(f"--images must be the folder of the images, got {options.images}")
    return options


@ends_in_one_line()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit with status 1 if the data have a fault."""
    escape_unprintable()
    options = parse(arguments)
    display = Display("auto")
    try:
        skeleton_of = _skeletons(options.skeleton, options.category, display.notify)
        files = options.compare or annotation_files(options.path)
    except InputError as error:
        sys.exit(f"error: {error}")
    names = [path.resolve().stem for path in options.compare or [options.path]]
    out = options.out or Path("-".join(["compare" if options.compare else "audit", *names]))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: --out must be a folder that can be made, got {out} ({error.strerror})")
    with display.meters() as meter:
        surveys = [
            survey(
                file,
                options.images,
                skeleton_of,
                options.category,
                meter(f"checking {file.name}"),
            )
            for file in files
        ]
        if options.compare:
            comparison = compare(surveys, meter)
    if options.compare:
        has_faults, written = report_comparison(*comparison, display.console, out)
    else:
        has_faults, written = report(surveys, display.console, out, options.sheet)
    print(f"written: {', '.join(map(str, written))}")
    sys.exit(1 if has_faults else 0)


def report(
    surveys: Sequence[Survey], console: Console, out: Path, num_sheet_images: int
) -> tuple[bool, list[Path]]:
    """Print what was found and write it; return whether there is a fault, and the files."""
    shared = leaks(surveys)
    for one in surveys:
        show(one, console)
    if shared:
        console.print("[bold red]faults of train and val together")
        console.print(describe(shared), markup=False, soft_wrap=True)
    faults = [fault for one in surveys for fault in one.faults] + shared
    written = [write_audit(out / FAULTS, faults)]
    if write_people(out / PEOPLE, surveys):
        written.append(out / PEOPLE)
    for one in surveys:
        sheet = out / f"{one.annotations.stem}.jpg"
        if num_sheet_images and one.usable and write_sheet(sheet, one.usable, num_sheet_images):
            written.append(sheet)
    return any(not fault.is_warning for fault in faults), written


def compare(surveys: Sequence[Survey], meter: Meter) -> tuple[People, People, list[SharedPerson]]:
    """Return the people of both files, and those of the first who are in the second.

    Exit with status 1 if a file has no people that a study could use.
    """
    both: list[People] = []
    for one in surveys:
        if one.usable is None:
            faults = [fault for fault in one.faults if not fault.is_warning]
            sys.exit(f"error: no person of {one.annotations} can be used:\n{describe(faults)}")
        usable = one.usable
        both.append(build_people(usable.table, usable.image_folder, leave_out=usable.left_out))
    ours, theirs = both
    return ours, theirs, shared_people(ours, theirs, meter)


def report_comparison(
    ours: People, theirs: People, shared: Sequence[SharedPerson], console: Console, out: Path
) -> tuple[bool, list[Path]]:
    """Print and write the people of both files; return whether there are any, and the file."""
    share = len(shared) / len(ours)
    lines = [
        f"{len(shared)} of {len(ours)} people in {ours.annotations} ({share:.1%}) are in "
        f"{theirs.annotations}, or their image is"
    ]
    reasons = collections.Counter(one.reason for one in shared)
    for reason, count in reasons.most_common(REASONS):
        first = next(one for one in shared if one.reason == reason)
        lines.append(
            f"  {reason} ({count}): annotation {ours.annotation_ids[first.row]} in "
            f"{ours.image_paths[first.row]}, there {first.other_image}"
        )
    if len(reasons) > REASONS:
        lines.append(f"  and {len(reasons) - REASONS} other reasons")
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    write_parquet(out / SHARED, shared_table(ours, theirs, shared))
    return bool(shared), [out / SHARED]


if __name__ == "__main__":
    main()
