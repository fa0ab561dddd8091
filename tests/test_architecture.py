"""Ratchets: sizes of files and functions, code lines per layer, contents of the wheel, imports."""

import ast
import subprocess
import sys
import tokenize
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for part in ("launch", "trainer", "models") for p in (ROOT / part).rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 250, 60
# Code lines when every feature of the design works; a breach needs a reason in docs/decisions.md.
CODE_LINES = {"models": 4_100, "trainer": 22_300, "launch": 9_175}
TOP_LEVEL = {
    "pyproject.toml", "trainer", "models", "configs", "launch", "tests", "README.md",
    "docs", "benchmarks", ".ci", "LICENSE", ".gitignore",
}  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_and_no_function_is_too_long(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE
    assert text.isascii()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION, node.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_and_every_public_class_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_no_text_has_marks_of_a_merge() -> None:
    texts = [ROOT / "README.md", *(p for part in TOP_LEVEL for p in (ROOT / part).rglob("*.*"))]
    marked = [
        p for p in texts if p.suffix in (".md", ".py", ".yaml", ".sh", ".toml") and is_marked(p)
    ]
    assert not marked


def is_marked(path: Path) -> bool:
    marks = tuple(mark * 7 + " " for mark in "<|>")
    return any(line.startswith(marks) for line in path.read_text().splitlines())


def code_lines(path: Path) -> int:
    """Count lines that hold code: no blanks, comments or docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in skipped | {tokenize.ENCODING, tokenize.ENDMARKER}:
                lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


@pytest.mark.parametrize("layer", CODE_LINES)
def test_a_layer_stays_small(layer: str) -> None:
    total = sum(code_lines(path) for path in SOURCES if path.is_relative_to(ROOT / layer))
    assert 0 < total <= CODE_LINES[layer]


def test_nothing_new_lies_at_the_top() -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout
    assert {line.partition("/")[0] for line in listed.splitlines()} <= TOP_LEVEL


def test_no_module_is_called_utils() -> None:
    bad = {"utils", "util", "common", "helpers", "misc"}
    assert not [path for path in SOURCES if path.stem in bad]


def test_the_wheel_holds_the_packages_and_every_yaml_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {name.partition("/")[0] for name in names}
    assert {p for p in packages if not p.endswith(".dist-info")} == {
        "launch", "trainer", "models", "configs",
    }  # fmt: skip
    yamls = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert yamls <= names
    assert len(yamls) > 10


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("launch.cli", {"torch", "hydra", "numpy", "yaml", "rich"}),
        ("launch.supervisor", {"torch", "hydra", "numpy"}),
        ("launch.report.write", {"torch", "hydra", "numpy", "PIL", "yaml"}),
        ("launch.diff.command", {"torch", "hydra", "numpy", "PIL", "yaml"}),
        ("trainer.checkpoint.commit", {"torch", "hydra", "numpy"}),
        ("trainer.checkpoint.writer", {"torch", "hydra", "numpy", "dataclasses"}),
        (
            "trainer.construct",
            {
                "transformers",
                "datasets",
                "wandb",
                "deepspeed",
                "accelerate",
                "hydra",
                "torch._dynamo",
                "torch.distributed.tensor",
                "sympy",
            },
        ),
    ],
)
def test_importing_a_module_brings_in_no_heavy_package(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not absent & set(done.stdout.split())
