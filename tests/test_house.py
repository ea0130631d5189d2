"""Rules of the house that no linter knows: who imports whom, what is not used, and a wheel that stands alone."""

import ast
import dataclasses
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from distill.config import Settings
from distill.documented import documented_yaml
from distill.settings import load_settings

ROOT = Path(__file__).parents[1]
PACKAGES = ("distill", "bundle", "bench", "cli")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
EVERY = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]

# Higher may import lower, never the other way round.
LAYERS = (
    "base",
    "backbone",
    "teacher",
    "corpus",
    "mining",
    "knowledge",
    "tokens",
    "vision",
    "student",
    "dream",
    "serve",
    "training",
    "learning",
    "exam",
    "report",
    "sweep",
)
BASE = (
    "distill",
    "distill.address",
    "distill.cluster",
    "distill.config",
    "distill.documented",
    "distill.errors",
    "distill.events",
    "distill.journal",
    "distill.policy",
    "distill.ranges",
    "distill.run",
    "distill.settings",
    "distill.shipped",
    "distill.spread",
    "distill.stopping",
    "distill.turns",
    "distill.written",
)
MAX_LINES = 400


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """A file's calls and imports; read once, for many rules look at them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.Call | ast.Import | ast.ImportFrom))


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in nodes(path) if isinstance(node, ast.Call))


@cache
def imported_modules(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file, those inside functions and `if TYPE_CHECKING` too."""
    return list(_imported_modules(path))


def _imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from distill import config` imports distill.config.
                below = ROOT.joinpath(*module.split("."), alias.name)
                is_module = below.with_suffix(".py").exists() or below.is_dir()
                yield node.lineno, f"{module}.{alias.name}" if is_module else module


def layer(module: str) -> int:
    if module in BASE:
        return 0
    parts = module.split(".")
    assert len(parts) > 1, module
    assert parts[1] in LAYERS, f"{module}: belongs to no layer of distill"
    return LAYERS.index(parts[1])


def test_imports_go_down_only() -> None:
    wrong: list[str] = []
    for path in SOURCES:
        here = module_name(path)
        for line, module in imported_modules(path):
            target = module.split(".")[0]
            if target not in PACKAGES:
                continue
            if PACKAGES.index(target) > PACKAGES.index(here.split(".")[0]):
                wrong.append(f"{path}:{line}: {here} imports {module}")
            elif here.startswith("distill") and module != "distill" and layer(module) > layer(here):
                wrong.append(f"{path}:{line}: {here} imports {module}, which lies above it")
    assert not wrong, "\n".join(wrong)


def test_no_import_circles() -> None:
    """Those inside functions count: what needs each other is one thing, or has a third between it."""
    imports = {module_name(path): {module for _, module in imported_modules(path)} for path in SOURCES}
    try:
        TopologicalSorter({here: there & imports.keys() - {here} for here, there in imports.items()}).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_what_measures_a_gpu_runs_from_the_source_alone() -> None:
    """On a machine that is lent for minutes there is torch, and nothing to install from."""
    paths, wanted, seen = {module_name(path): path for path in SOURCES}, ["bench.gpu"], set[str]()
    while wanted:
        here = wanted.pop()
        seen.add(here)
        if here in paths:
            tree = ast.parse(paths[here].read_text(encoding="utf-8"))
            first = {node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
            wanted += {module for line, module in imported_modules(paths[here]) if line in first} - seen
    others = {module.split(".")[0] for module in seen} - set(PACKAGES) - sys.stdlib_module_names
    assert others <= {"networkx", "numpy", "safetensors", "scipy", "threadpoolctl", "tokenizers", "torch", "tqdm"}


def test_the_import_check_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule above would be worthless if it found nothing."""
    folder = tmp_path / "distill" / "teacher"
    folder.mkdir(parents=True)
    wrong = folder / "wrong.py"
    wrong.write_text("def f():\n    from ..training import loop\n    import cli.main\n", encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    found = {module for _, module in imported_modules(wrong)}
    assert {"distill.training", "cli.main"} <= found
    assert layer("distill.training") > layer("distill.teacher.wrong")


def test_no_pickles() -> None:
    """Nothing we write or read can run code: no pickle, and nothing that is one underneath."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    imports = [
        f"{path}:{line}: {module}"
        for path in SOURCES
        for line, module in imported_modules(path)
        if module.split(".")[0] in forbidden
    ]
    pickling = [
        f"{path}:{node.lineno}: {ast.unparse(node.func)}"
        for path in SOURCES
        for node in calls(path)
        if ast.unparse(node.func) in ("torch.load", "torch.save", "torch.jit.load", "torch.jit.save")
        or any(keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False" for keyword in node.keywords)
    ]
    assert not imports + pickling


@pytest.mark.parametrize("package", ["distill", "bundle", "bench"])
def test_libraries_do_not_print(package: str) -> None:
    printing = [
        f"{path}:{node.lineno}"
        for path in (ROOT / package).rglob("*.py")
        for node in calls(path)
        if ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not printing


def opens_text_by_locale(call: ast.Call) -> bool:
    """What ruff's PLW1514 sees only where it knows that something is a Path."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given:
        return False
    match call.func:
        case ast.Attribute(attr="read_text" | "write_text" as name):
            return len(call.args) <= (name == "write_text")
        case ast.Attribute(
            attr="open", value=ast.Name("Run" | "Image" | "tarfile" | "os" | "browser" | "self" | "cls")
        ):
            return False
        case ast.Attribute(attr="open") | ast.Name("open") as opened:
            mode = given.get("mode", next(iter(call.args[isinstance(opened, ast.Name) :]), None))
            return mode is None or "b" not in ast.unparse(mode)
        case _:
            return "text" in given and "text=True" in ast.unparse(call)


def test_text_is_utf_8_whatever_the_locale() -> None:
    wrong = [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path in EVERY
        for node in calls(path)
        if opens_text_by_locale(node)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("path.open('a')", True),
        ("open(path)", True),
        ("subprocess.run(['x'], text=True)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("path.open('rb')", False),
        ("open(path, mode='wb')", False),
    ],
)
def test_the_encoding_check_sees_what_is_wrong(call: str, wrong: bool) -> None:
    tree = ast.parse(call, mode="eval").body
    assert isinstance(tree, ast.Call)
    assert opens_text_by_locale(tree) == wrong


def test_files_read_in_one_sitting() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_default_config_is_the_defaults() -> None:
    path = ROOT / "configs" / "default.yaml"
    assert path.read_text(encoding="utf-8") == documented_yaml(), (
        "configs/default.yaml: run `dream settings > configs/default.yaml`"
    )
    assert load_settings(path) == Settings()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    assert dataclasses.is_dataclass(load_settings(path))


def test_constraints_pin_every_dependency() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [
        line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    pins = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    for line in wanted:
        requirement = Requirement(line)
        pin = pins[canonicalize_name(requirement.name)]
        (version,) = pin.specifier
        assert version.operator == "=="
        assert "+" not in version.version, f"{pin}: a local version is tied to one machine's wheels"
        assert requirement.specifier.contains(version.version), f"{pin} does not satisfy {line}"


def test_wheel_works_from_another_folder(tmp_path: Path) -> None:
    """Built offline, unpacked alone: the command starts, and sets, templates and configs come from the wheel."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    probe = (
        "import cli.main, bundle\n"
        "from distill.corpus.prompts import load_prompts, prompt_sets\n"
        "print(cli.main.__file__)\n"
        "print(*prompt_sets().values(), sep='\\n')\n"
        "print(len(load_prompts(list(prompt_sets()), 0.1)))\n"
    )
    # -S -E would lose the dependencies too; -P keeps the working folder out and PYTHONPATH puts the wheel first.
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", probe],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    *paths, prompts = done.stdout.split()
    assert all(Path(path).is_relative_to(site) for path in paths), paths
    assert len(paths) >= 4
    assert int(prompts) >= 2000
    help = subprocess.run(
        [sys.executable, "-P", "-m", "cli.main", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert help.returncode == 0
    assert "Usage: dream" in help.stdout
    templates = {path.name for path in (ROOT / "Modelfiles").iterdir()}
    assert templates
    assert templates == {path.name for path in (site / "bundle" / "_modelfiles").iterdir()}
    assert (site / "distill" / "_configs" / "default.yaml").read_text(encoding="utf-8") == documented_yaml()
