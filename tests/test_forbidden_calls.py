"""What code of ours never calls: whatever runs what it reads, or pickles what it sends."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_architecture import ROOT, SOURCES

FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "os.system", "os.popen",
    "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "numpy.fromregex",
    "joblib.load", "marshal.loads", "shelve.open", "pandas.read_pickle",
}  # fmt: skip
FORBIDDEN_ENDS = ("_object", "_object_list", "extractall", "_objects", "unpack_archive")
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` of an attribute chain; only its end where it begins with a call."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else f".{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def aliases(tree: ast.AST) -> dict[str, str]:
    """Return the full names of what a module imports, by the names that it has there."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                head = name.name.partition(".")[0]
                found[name.asname or head] = name.name if name.asname else head
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def offences(source: str) -> list[str]:
    """Return what a module's text does that none of ours may."""
    tree = ast.parse(source)
    names, found = aliases(tree), []
    for module in names.values():
        if module.partition(".")[0] in FORBIDDEN_MODULES:
            found.append(f"import {module}")
    for call in calls(tree):
        written = dotted(call.func)
        first, _, rest = written.partition(".")
        full = ".".join(filter(None, (names.get(first, first), rest)))
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if written in FORBIDDEN_NAMES or full in FORBIDDEN_CALLS or full.endswith(FORBIDDEN_ENDS):
            found.append(full)
        if full == "numpy.load" and not is_false(keywords.get("allow_pickle")):
            found.append("numpy.load without allow_pickle=False")
        if "shell" in keywords and not is_false(keywords["shell"]):
            found.append(f"{full} with a shell")
        if "trust_remote_code" in keywords and not is_false(keywords["trust_remote_code"]):
            found.append(f"{full} with remote code")
        if full.endswith(".from_pretrained") and "trust_remote_code" not in keywords:
            found.append(f"{full} without trust_remote_code=False")
    return found


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    assert not offences(path.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import cloudpickle as c",
        "eval('1')", "exec(text)", "import torch\ntorch.load(path, weights_only=True)",
        "from torch import load\nload(path)", "import torch as t\nt.save(x, path)",
        "import numpy as np\nnp.load(path)", "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import yaml\nyaml.load(text)", "import subprocess\nsubprocess.run(x, shell=True)",
        "import os\nos.system(x)", "archive.extractall(path)", "open_tar().extractall()",
        "import torch.distributed as dist\ndist.all_gather_object(a, b)",
        "import torch.distributed as dist\ndist.broadcast_object_list(a)",
        "AutoModel.from_pretrained(folder)",
        "AutoModel.from_pretrained(folder, trust_remote_code=flag)",
    ],
)  # fmt: skip
def test_each_of_them_would_be_found(line: str) -> None:
    assert offences(line)


def test_what_is_harmless_is_not_found() -> None:
    harmless = (
        "import re\nimport yaml\nimport numpy as np\nre.compile('a')\nmodel.eval()\n"
        "yaml.safe_load(text)\nnp.load(path, allow_pickle=False)\nblock.compile(dynamic=False)\n"
    )
    assert not offences(harmless)
