"""What is installed is what is on disk."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import prift

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"prift": "prift", "cli": "prift_cli"}


def packages_on_disk() -> set[str]:
    found = set()
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *parts)))
    return found


def modules_on_disk() -> set[str]:
    """Paths inside a wheel."""
    return {
        f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, name in FOLDERS.items()
        for kind in ("*.py", "*.cpp")
        for path in (ROOT / folder).rglob(kind)
    }


def test_package_list_is_what_is_on_disk():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {n: f for f, n in FOLDERS.items()}


def test_version_is_said_once():
    assert PROJECT["project"]["version"] == prift.__version__ == version("prift")


def test_entry_point():
    [command] = [e for e in entry_points(group="console_scripts") if e.name == "prift"]
    from prift_cli import main

    assert command.load() is main


def test_third_party_imports_are_declared():
    """Each package that prift imports is a dependency, or an extra that an error names."""
    import ast

    declared = list(PROJECT["project"]["dependencies"])
    for extra in ("peft", "ray", "vllm"):
        declared += PROJECT["project"]["optional-dependencies"][extra]
    names = {re.split(r"[\[<>]", d)[0].lower().replace("-", "_") for d in declared}
    # transformers cannot be without these
    names |= {"numpy", "safetensors", "huggingface_hub", "jinja2", "tokenizers"}
    names.add("cut_cross_entropy")  # used where it is; no registry has the version that is wanted
    names = names - {"pyyaml"} | {"yaml", "prift", "prift_cli"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                found = []
                if isinstance(node, ast.Import):
                    found = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found = [node.module]
                for name in (f.split(".")[0] for f in found):
                    assert name in names or name in sys.stdlib_module_names, f"{path}: {name}"


def test_wheel_holds_every_module(tmp_path):
    """Built from a copy, so that the checkout keeps no build folder."""
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", "prift", "cli"):
        if (ROOT / name).exists():
            done = ["cp", "-r", str(ROOT / name), str(source / name)]
            source.mkdir(exist_ok=True)
            subprocess.run(done, check=True, timeout=30)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
        + ["--no-index", "--disable-pip-version-check", "--wheel-dir", tmp_path, source],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if n.endswith((".py", ".cpp"))}
    assert held == modules_on_disk()
