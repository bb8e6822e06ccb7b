"""The rules of the layout: who may import whom, what a name may be, how long a file may grow."""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "search_spaces", "study")
SOURCES = {
    file.relative_to(ROOT).as_posix(): ast.parse(file.read_text())
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
}
TESTS = {
    file.relative_to(ROOT).as_posix(): ast.parse(file.read_text())
    for file in sorted((ROOT / "tests").rglob("*.py"))
}
FOLDERS = (*PACKAGES, "cluster")

CORE = (
    *("losses", "distill", "refine", "loop", "training", "trial", "evaluation", "metrics"),
    *("batches", "checkpoint", "pose_errors", "teacher", "store", "prepare", "dataset", "crops"),
    *("teachers", "vitpose", "onnx_teacher", "predictions", "detections", "oks_nms"),
)
OWNERS = {
    "ray": {
        *("study/cropping.py", "study/launch.py", "study/searcher.py", "study/tuning.py"),
        "study/confirm.py",
    },
    "optuna": {
        *("search_spaces/space.py", "study/search.py", "study/samplers.py"),
        *("study/several_objectives.py", "study/warm_start.py", "study/staged.py"),
        "study/stage_search.py",
        *("study/analyze.py", "study/importance.py", "study/pictures.py"),
    },
    "hydra": {"study/config.py", "study/overrides.py"},
    "cv2": {
        *("study/picture_files.py", "study/augmentation.py", "study/crops.py", "study/predict.py"),
        *("study/drawing.py", "study/drawn_sheet.py", "study/workers.py"),
        *("study/crop_files.py", "study/cropping.py"),
    },
    "pyarrow": {
        *("study/columns.py", "study/results.py", "study/finals.py"),
        *("study/crop_files.py", "study/crop_bucket.py"),
        *("study/audit_table.py", "study/survey.py"),
    },
    "matplotlib": {"study/pictures.py", "study/final_pictures.py", "study/pareto_picture.py"},
    "faster_coco_eval": {"study/metrics.py"},
    "mlflow": {"study/trial_logs.py"},
    "onnx": {"study/onnx_export.py"},
    "onnxruntime": {"study/onnx_export.py", "study/onnx_teacher.py"},
    "onnxscript": {"study/onnx_export.py"},
    "tensorboard": {"study/trial_logs.py"},
    "transformers": {"study/vitpose.py"},
}
GRIDS = {"grid_sample", "affine_grid"}
SAMPLERS = {*GRIDS, "interpolate", "Upsample"}


def files_of(package: str) -> list[str]:
    return [file for file in SOURCES if file.startswith(f"{package}/")]


@functools.cache
def imports(tree: ast.Module) -> set[str]:
    """What a file imports, at its head or in a function: modules, and names that may be such."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@functools.cache
def ours(file: str) -> set[str]:
    """The files of ours that a file imports."""
    named = (f"{module.replace('.', '/')}.py" for module in imports(SOURCES[file]))
    return {name for name in named if name in SOURCES}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func
            if isinstance(name, ast.Attribute | ast.Name):
                yield (name.attr if isinstance(name, ast.Attribute) else name.id), node


def loaded_after(*modules: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after these imports."""
    script = (
        f"import sys, {', '.join(modules)}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_models_load_nothing_but_torch_and_what_it_needs() -> None:
    modules = [file.removesuffix(".py").replace("/", ".") for file in files_of("models")]
    loaded = loaded_after(*(name.removesuffix(".__init__") for name in modules))
    assert "torch" in loaded
    banned = {*OWNERS, "study", "search_spaces", "omegaconf", "yaml", "scipy", "sklearn", "rich"}
    assert loaded & banned == set()


def test_search_spaces_load_no_model_and_no_ray() -> None:
    loaded = loaded_after("search_spaces.space")
    assert loaded & {"torch", "ray", "models", "study", "cv2", "pyarrow"} == set()


@pytest.mark.slow
def test_core_loads_no_ray_and_no_optuna() -> None:
    loaded = loaded_after(*(f"study.{name}" for name in CORE))
    assert "torch" in loaded
    unwanted = {"ray", "optuna", "matplotlib", "rich", "transformers", "onnxruntime"}
    assert loaded & unwanted == set()


def test_config_loads_no_torch() -> None:
    loaded = loaded_after("study.config")
    assert loaded & {"torch", "numpy", "ray", "optuna", "models", "search_spaces"} == set()


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_heavy_dependency_is_imported_by_its_owners_alone(library: str) -> None:
    found = {
        file
        for file, tree in SOURCES.items()
        if library in {name.split(".")[0] for name in imports(tree)}
    }
    assert found == OWNERS[library]


def test_imports_go_from_study_to_spaces_to_models() -> None:
    allowed = {
        "models": {"models"},
        "search_spaces": {"search_spaces"},
        "study": set(PACKAGES),
    }
    wrong = [
        f"{file} imports {other}"
        for file in SOURCES
        for other in ours(file)
        if other.split("/")[0] not in allowed[file.split("/")[0]]
    ]
    assert wrong == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    left = {file: ours(file) - {file} for file in SOURCES}
    while free := [file for file, needed in left.items() if not needed & left.keys()]:
        for file in free:
            del left[file]
    assert left == {}


def test_no_script_is_imported() -> None:
    scripts = {f"study/{name}.py" for name in ("tune", "analyze", "export", "predict")}
    assert {file: ours(file) & scripts for file in SOURCES if ours(file) & scripts} == {}


def test_no_file_of_study_hides_another_module() -> None:
    """``python study/tune.py`` puts study/ first on the path."""
    installed = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if set(distributions) != {"pose-distillation-study"}
    }
    names = {path.stem if path.is_file() else path.name for path in (ROOT / "study").iterdir()}
    assert names & (installed | set(sys.stdlib_module_names)) == set()


def test_no_test_folder_hides_a_package() -> None:
    assert [path.name for path in (ROOT / "tests").iterdir() if path.name in PACKAGES] == []


def test_device_is_never_chosen_by_hand() -> None:
    by_hand = {file: r"\.cuda\(" for file in SOURCES}
    by_hand |= {file: r"\.cuda\(|\.cpu\(|\.to\((torch\.)?device" for file in files_of("models")}
    assert [file for file in SOURCES if re.search(by_hand[file], (ROOT / file).read_text())] == []


def test_align_corners_is_always_written() -> None:
    places = []
    for file, tree in SOURCES.items():
        for name, call in calls(tree):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            # Between whole pixels there are no corners, and torch refuses the word.
            is_nearest = name not in GRIDS and "nearest" in keywords.get("mode", "nearest")
            if name in SAMPLERS and not is_nearest and "align_corners" not in keywords:
                places.append(f"{file}:{call.lineno}")
    assert places == []
    assert {name for tree in SOURCES.values() for name, _ in calls(tree)} & GRIDS


def test_files_and_functions_are_short_enough_to_read() -> None:
    long = []
    for file, tree in {**SOURCES, **TESTS}.items():
        if len((ROOT / file).read_text().splitlines()) > 400:
            long.append(file)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 80:
                long.append(f"{file}: {node.name}")
    assert long == []


def test_code_and_settings_are_ascii() -> None:
    settings = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.yaml")]
    assert len(settings) >= 9
    files = [*(ROOT / file for file in {**SOURCES, **TESTS}), *settings, ROOT / ".ci" / "run"]
    assert [str(file) for file in files if not file.read_text("utf-8").isascii()] == []


def test_modules_classes_and_public_functions_say_what_they_are() -> None:
    silent = []
    for file, tree in SOURCES.items():
        functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
        classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
        public = [node for node in functions if not node.name.startswith("_")]
        if tree.body and not ast.get_docstring(tree):
            silent.append(file)
        silent += [
            f"{file}: {node.name}"
            for node in (*classes, *public)
            if not ast.get_docstring(node) and node.name != "main"
        ]
    assert "\n".join(silent) == ""


def test_every_function_is_annotated_whole() -> None:
    bare = []
    for file, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                open_ones = [a for a in every if not a.annotation and a.arg not in ("self", "cls")]
                if open_ones or node.returns is None:
                    bare.append(f"{file}: {node.name}")
    assert bare == []


def test_no_class_is_named_for_nothing() -> None:
    names = [
        node.name
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    assert [name for name in names if re.search("Base(?!line)|Helper|Manager|Utils?$", name)] == []


def test_readme_shows_the_whole_tree_and_nothing_else() -> None:
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    trees = [block for block in blocks if re.search(r"^models/", block, re.MULTILINE)]
    assert len(trees) == 1, "README.md must have one code block with the tree, models/ and all"
    named = {word for line in trees[0].splitlines() for word in line.split()[:1]}
    every = {word for line in trees[0].splitlines() for word in re.findall(r"[\w.*-]+", line)}
    files = {
        path.name
        for folder in FOLDERS
        for path in (ROOT / folder).iterdir()
        if path.is_file() and path.name != "__init__.py"
    }
    missing = [name for name in files if not any(fnmatch.fnmatch(name, word) for word in every)]
    assert sorted(missing) == []
    folders = [ROOT, *(ROOT / folder for folder in (*FOLDERS, "tests"))]
    present = {path.name for folder in folders for path in folder.iterdir()}
    gone = [n for n in named if re.fullmatch(r"\w+\.(py|yaml|md)", n) and n not in present]
    assert sorted(gone) == []
