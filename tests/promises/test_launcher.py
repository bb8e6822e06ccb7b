"""The commands work from anywhere, with their checkout's modules or the installed ones."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("models", "search_spaces", "study")
SCRIPTS = ("tune", "dataset", "analyze", "export", "predict")
BENCHMARKS = sorted(
    file.name
    for file in (ROOT / "tests" / "benchmarks").glob("*.py")
    if file.name != "benchmark.py"
)

EXPLAIN = """
import contextlib, io, json, runpy, sys
folder, *scripts = sys.argv[1:]
sys.path.insert(0, folder)
printed = {}
for script in scripts:
    sys.argv = [f"{folder}/{script}", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    printed[script] = text.getvalue()
print(json.dumps(printed))
"""


def copy_packages(folder: Path, seed: int) -> Path:
    """Copy the packages and set the default seed, by which a test recognizes the copy."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    settings = folder / "study" / "config" / "study.yaml"
    settings.write_text(settings.read_text().replace("\nseed: 0\n", f"\nseed: {seed}\n"))
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_packages(tmp_path_factory.mktemp("checkout"), seed=4711)


def run(script: str | Path, *arguments: str, cwd: Path, path: str = "") -> str:
    """Run a script without warnings or errors and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def seed_of(output: str) -> int:
    return int(yaml.safe_load(output)["seed"])


def test_launcher_works_from_the_checkouts_root(checkout: Path) -> None:
    assert seed_of(run("study/tune.py", "--cfg", cwd=checkout)) == 4711


def test_launcher_works_from_another_directory(checkout: Path, tmp_path: Path) -> None:
    assert seed_of(run(checkout / "study" / "tune.py", "--cfg", cwd=tmp_path)) == 4711
    assert list(tmp_path.iterdir()) == []


def test_launcher_works_through_a_symlink(checkout: Path, tmp_path: Path) -> None:
    link = tmp_path / "run-a-study"
    link.symlink_to(checkout / "study" / "tune.py")
    assert seed_of(run(link, "--cfg", cwd=tmp_path)) == 4711


def test_launcher_copied_alone_uses_the_installed_package(tmp_path: Path) -> None:
    """``ray submit`` copies a script into a home that may have folders of the packages' names."""
    site = copy_packages(tmp_path / "site", seed=4712)
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    (home / "study").mkdir()
    shutil.copy(ROOT / "study" / "tune.py", home)
    assert seed_of(run("tune.py", "--cfg", cwd=home, path=str(site))) == 4712
    assert seed_of(run(home / "tune.py", "--cfg", cwd=tmp_path, path=str(site))) == 4712


def test_checkout_is_preferred_to_an_installed_copy(checkout: Path, tmp_path: Path) -> None:
    site = copy_packages(tmp_path / "site", seed=4712)
    output = run(checkout / "study" / "tune.py", "--cfg", cwd=tmp_path, path=str(site))
    assert seed_of(output) == 4711


@pytest.mark.parametrize(
    "script", ["tune", *(pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS[1:])]
)
def test_help_is_printed_from_another_directory(script: str, tmp_path: Path) -> None:
    output = run(ROOT / "study" / f"{script}.py", "--help", cwd=tmp_path)
    assert output.startswith(f"usage: {script}.py")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_workers_run_the_code_of_the_command_and_not_of_the_working_directory(
    tmp_path: Path,
) -> None:
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('wrong package')")
    out = run(
        ROOT / "study" / "tune.py",
        "storage=s",
        "display=plain",
        "data.num_train_images=16",
        "data.num_val_images=4",
        "data.input_size=[64,64]",
        "teacher.size=tiny",
        "teacher.epochs=1",
        "distill.epochs=1",
        "refine.epochs=0",
        "search.trials=2",
        "search_space=smoke",
        "confirm.trials=0",
        cwd=tmp_path,
    )
    assert "winner: trial" in out
    assert (tmp_path / "s/drawn-joint-smoke/results/final").is_dir()


def test_unknown_setting_ends_with_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "study" / "tune.py", "refine.dept=3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    expected = "error: unknown setting refine.dept; did you mean refine.depth?\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_imports_only_os_signal_and_sys_before_it_sets_its_path(script: str) -> None:
    body = ast.parse((ROOT / "study" / f"{script}.py").read_text()).body
    at = next(
        i for i, node in enumerate(body) if "sys.path[0] = os.path.dirname(HERE)" in text(node)
    )
    early = [node for node in body[:at] if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {text(node) for node in early}
    assert {"import os", "import sys"} <= names <= {"import os", "import signal", "import sys"}


def test_tune_defines_only_its_own_course_so_that_workers_need_nothing_of_it() -> None:
    body = ast.parse((ROOT / "study" / "tune.py").read_text()).body
    defined = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert [node.name for node in defined] == ["main", "run"]


def text(node: ast.AST) -> str:
    return ast.unparse(node)


@pytest.fixture(scope="module")
def explained() -> dict[str, str]:
    """Help of each benchmark, all printed by one process, because imports take the time."""
    folder = ROOT / "tests" / "benchmarks"
    command = [sys.executable, "-c", EXPLAIN, str(folder), *BENCHMARKS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_starts_and_prints_its_help(
    benchmark: str, explained: dict[str, str]
) -> None:
    assert f"usage: {benchmark}" in explained[benchmark]
