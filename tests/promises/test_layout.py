"""Rules of the layout: allowed imports, owners of libraries, names and lengths of files."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from source_code import PACKAGES, ROOT, SOURCES, TESTS, calls, imported_files, imports, module_of

FOLDERS = (*PACKAGES, "cluster")
COMMANDS = ("tune", "dataset", "analyze", "export", "predict")

LAYERS = (
    "models",
    "search_spaces",
    "study.errors",
    "study.interrupts",
    "study.display",
    "study.workers",
    "study.config",
    "study.storage",
    "study.data",
    "study.metrics",
    "study.cache",
    "study.training",
    "study.teachers",
    "study.trial",
    "study.launch",
    "study.search",
    "study.validation",
    "study.dry_run",
    "study.analysis",
    "study.deploy",
    "study.driver",
)
"""Packages and modules in the order of imports: each imports only earlier ones."""
CORE = ("data", "cache", "training", "teachers", "metrics", "trial")
"""Packages and modules of study/ that load neither Ray nor Optuna, for notebooks."""
OWNERS = {
    "ray": {
        "study/driver.py",
        "study/launch/cluster.py",
        "study/launch/crop_tasks.py",
        "study/launch/jobs.py",
        "study/launch/ray_start.py",
        "study/launch/ray_train.py",
        "study/launch/trials.py",
        "study/launch/tune_adapter.py",
        "study/validation/confirm.py",
    },
    "optuna": {
        "search_spaces/space.py",
        "study/analysis/importance.py",
        "study/analysis/parallel_coordinates.py",
        "study/analyze.py",
        "study/search/owner.py",
        "study/search/samplers.py",
        "study/search/stage.py",
        "study/search/staged.py",
        "study/search/warm_start.py",
    },
    "hydra": {"study/config/compose.py"},
    "cv2": {
        "study/cache/crop_parts.py",
        "study/data/augmentation.py",
        "study/data/crops.py",
        "study/data/image_files.py",
        "study/data/survey.py",
        "study/data/synthetic/render.py",
        "study/launch/crop_tasks.py",
        "study/deploy/detector.py",
        "study/deploy/drawing.py",
        "study/deploy/video.py",
        "study/workers.py",
    },
    "pyarrow": {
        "study/analysis/tables.py",
        "study/cache/arrow_file.py",
        "study/cache/crop_bucket.py",
        "study/cache/crop_parts.py",
        "study/data/audit.py",
        "study/dataset.py",
        "study/storage/tables.py",
        "study/validation/finalists.py",
    },
    "matplotlib": {
        "study/analysis/figures.py",
        "study/analysis/parallel_coordinates.py",
        "study/analysis/plots.py",
    },
    "faster_coco_eval": {"study/metrics.py"},
    "mlflow": {"study/storage/trackers.py"},
    "onnx": {"study/deploy/onnx_export.py"},
    "onnxruntime": {"study/deploy/onnx_export.py", "study/teachers/onnx_model.py"},
    "onnxscript": {"study/deploy/onnx_export.py"},
    "tensorboard": {"study/storage/trackers.py"},
    "transformers": {"study/teachers/vitpose.py"},
}
GRIDS = {"grid_sample", "affine_grid"}
SAMPLERS = {*GRIDS, "interpolate", "Upsample"}


def files_of(package: str) -> list[str]:
    return [file for file in SOURCES if file.startswith(f"{package}/")]


def layer_of(file: str) -> int:
    """Place in LAYERS; that of commands is last, that of ``study/__init__.py`` first."""
    module = module_of(file)
    if module == "study":
        return 0
    found = [n for n, layer in enumerate(LAYERS) if f"{module}.".startswith(f"{layer}.")]
    if module.removeprefix("study.") in COMMANDS:
        return len(LAYERS)
    assert len(found) == 1, f"{file} must be in one layer of LAYERS"
    return found[0]


def modules_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if path.name != "__init__.py")


def packages() -> list[Path]:
    """Folders of the three packages that hold modules."""
    found = {(ROOT / file).parent for file in SOURCES}
    return sorted(folder for folder in found if modules_in(folder))


def loaded_after(*modules: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after these imports."""
    script = (
        f"import sys, {', '.join(modules)}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_models_load_only_torch_and_its_dependencies() -> None:
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
    core = [module_of(file) for file in SOURCES if module_of(file).split(".")[1:2] != []]
    modules = [name for name in core if name.startswith("study.") and name.split(".")[1] in CORE]
    loaded = loaded_after(*modules)
    assert "torch" in loaded
    unwanted = {"ray", "optuna", "matplotlib", "transformers", "onnxruntime"}
    assert loaded & unwanted == set()


def test_config_loads_no_torch() -> None:
    modules = [f"study.config.{name}" for name in modules_in(ROOT / "study/config")]
    loaded = loaded_after(*(name for name in modules if name != "study.config.derived"))
    assert "omegaconf" in loaded
    assert loaded & {"torch", "numpy", "ray", "optuna", "models", "search_spaces"} == set()


def test_objectives_load_no_optuna() -> None:
    assert loaded_after("study.search.objectives") & {"optuna", "ray", "torch"} == set()


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_heavy_library_is_imported_only_by_its_owners(library: str) -> None:
    found = {
        file
        for file, tree in SOURCES.items()
        if library in {name.split(".")[0] for name in imports(tree)}
    }
    assert found == OWNERS[library]


def test_imports_follow_the_order_of_the_layers() -> None:
    allowed = {
        "models": {"models"},
        "search_spaces": {"search_spaces"},
        "study": set(PACKAGES),
    }
    wrong = [
        f"{file} imports {other}"
        for file in SOURCES
        for other in imported_files(file)
        if layer_of(other) > layer_of(file)
        or other.split("/")[0] not in allowed[file.split("/")[0]]
    ]
    assert wrong == []


def test_every_layer_has_files() -> None:
    places = {layer_of(file) for file in SOURCES}
    assert places == set(range(len(LAYERS) + 1))


def test_package_docstrings_list_their_modules() -> None:
    for folder in packages():
        if folder.relative_to(ROOT).as_posix() == "study":
            continue
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        rows = dict(line.split(maxsplit=1) for line in docstring.split("\n\n")[1].splitlines())
        settings = {path.name for path in folder.glob("*.yaml")}
        inner = {f"{path.name}/" for path in folder.iterdir() if (path / "__init__.py").is_file()}
        assert rows.keys() == {*modules_in(folder), *settings, *inner}, folder
        counts = {name: len(text.split()) for name, text in rows.items()}
        assert {name: n for name, n in counts.items() if not 3 <= n <= 8} == {}, folder


def test_package_files_hold_only_a_docstring() -> None:
    files = [file for file in SOURCES if file.endswith("/__init__.py")]
    assert len(files) > 10
    files.remove("study/__init__.py")
    assert [file for file in files if len(SOURCES[file].body) > 1] == []


def test_packages_have_at_most_fifteen_modules() -> None:
    counts = {
        folder.relative_to(ROOT).as_posix(): len(modules_in(folder)) for folder in packages()
    }
    assert counts.pop("study") <= len(COMMANDS) + 7
    assert {name: count for name, count in counts.items() if count > 15} == {}


def test_imports_have_no_cycle() -> None:
    left = {file: imported_files(file) - {file} for file in SOURCES}
    while free := [file for file, needed in left.items() if not needed & left.keys()]:
        for file in free:
            del left[file]
    assert left == {}


def test_no_script_is_imported() -> None:
    scripts = {f"study/{name}.py" for name in COMMANDS}
    assert {
        file: imported_files(file) & scripts for file in SOURCES if imported_files(file) & scripts
    } == {}


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


def test_device_is_not_hard_coded() -> None:
    banned = {file: r"\.cuda\(" for file in SOURCES}
    banned |= {file: r"\.cuda\(|\.cpu\(|\.to\((torch\.)?device" for file in files_of("models")}
    assert [file for file in SOURCES if re.search(banned[file], (ROOT / file).read_text())] == []


def test_align_corners_is_always_explicit() -> None:
    places = []
    for file, tree in SOURCES.items():
        for name, call in calls(tree):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            # torch rejects align_corners for nearest neighbors.
            is_nearest = name not in GRIDS and "nearest" in keywords.get("mode", "nearest")
            if name in SAMPLERS and not is_nearest and "align_corners" not in keywords:
                places.append(f"{file}:{call.lineno}")
    assert places == []
    assert {name for tree in SOURCES.values() for name, _ in calls(tree)} & GRIDS


def test_files_have_at_most_500_lines_and_functions_at_most_80() -> None:
    long = []
    for file, tree in {**SOURCES, **TESTS}.items():
        if len((ROOT / file).read_text().splitlines()) > 500:
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


def test_modules_classes_and_public_functions_have_docstrings() -> None:
    missing = []
    for file, tree in SOURCES.items():
        functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
        classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
        public = [node for node in functions if not node.name.startswith("_")]
        if tree.body and not ast.get_docstring(tree):
            missing.append(file)
        missing += [
            f"{file}: {node.name}"
            for node in (*classes, *public)
            if not ast.get_docstring(node) and node.name != "main"
        ]
    assert "\n".join(missing) == ""


def test_every_function_is_fully_annotated() -> None:
    bare = []
    for file, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                open_ones = [a for a in every if not a.annotation and a.arg not in ("self", "cls")]
                if open_ones or node.returns is None:
                    bare.append(f"{file}: {node.name}")
    assert bare == []


def test_few_functions_take_the_whole_config() -> None:
    """Settings are resolved once; below ``trial.py`` functions take single sections of them."""
    taking: list[str] = []
    for file in files_of("study"):
        for node in ast.walk(SOURCES[file]):
            if isinstance(node, ast.FunctionDef):
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                hints = [ast.unparse(a.annotation) for a in every if a.annotation]
                if any("StudyConfig" in hint for hint in hints):
                    taking.append(f"{file}: {node.name}")
    low = ("study/cache/", "study/training/", "study/teachers/")
    assert [name for name in taking if name.startswith(low)] == []
    assert 0 < len(taking) <= 30, "\n".join(taking)


def test_no_class_is_a_base_helper_manager_or_util() -> None:
    names = [
        node.name
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    assert [name for name in names if re.search("Base(?!line)|Helper|Manager|Utils?$", name)] == []


def test_code_in_strings_imports_what_exists() -> None:
    """Tests hand such code to other processes, where a renamed module is found late."""
    modules = {module_of(file): tree for file, tree in SOURCES.items()}
    written = re.compile(
        r"(?:from|import) ((?:models|search_spaces|study)[.\w]*)(?: import (\w+))?"
    )
    found, missing = 0, []
    for file, tree in {**SOURCES, **TESTS}.items():
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        for module, name in written.findall("\n".join(map(str, texts))):
            found += 1
            is_module = f"{module}.{name}" in modules
            is_defined = module in modules and (not name or name in ast.unparse(modules[module]))
            if not is_module and not is_defined:
                missing.append(f"{file}: {module} {name}")
    assert missing == []
    assert found > 5


def test_readme_names_every_folder() -> None:
    readme = (ROOT / "README.md").read_text()
    folders = {f"{path.name}/" for path in packages()}
    assert {name for name in folders if name not in readme} == set()
