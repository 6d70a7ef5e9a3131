"""The layering, what is public, and what importing costs: kept true by tests."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import shardstate

SOURCE = Path(shardstate.__file__).parent

# A module imports only what stands above it. Imports inside functions are free.
ORDER = [
    "errors",
    "garbage",
    "dtypes",
    "jsontext",
    "layout",
    "sharding",
    "header",
    "catalog",
    "digest",
    "plan",
    "compose",
    "restore",
    "names",
    "manifest",
    "provenance",
    "parts",
    "report",
    "plot",
    "buffers",
    "storage",
    "signing",
    "coalesce",
    "meter",
    "raw",
    "targets",
    "engine",
    "checkpoint",
    "inventory",
    "commit",
    "transfer",
    "cachedir",
    "findings",
    "against",
    "verify",
    "trust",
    "repair",
    "api",
    "__init__",
    "torch",
    "vllm",
    "cli",
    "__main__",
]
PURE = {
    "errors", "dtypes", "jsontext", "layout", "sharding", "header", "catalog", "digest", "plan",
    "compose", "restore", "names", "manifest", "provenance", "parts", "coalesce",
    "plot",
}  # fmt: skip
EFFECTS = {"os", "io", "socket", "threading", "mmap", "subprocess", "pathlib", "time", "random"}


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE)
        yield relative.parts[0].removesuffix(".py"), path


def top_level_imports(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            if node.module == "shardstate":
                yield from (f"shardstate.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def test_every_module_has_its_place():
    assert {name for name, _ in modules()} == set(ORDER)


@pytest.mark.parametrize(("own", "path"), list(modules()), ids=lambda x: str(x).split("/")[-1])
def test_modules_import_only_what_stands_above_them(own, path):
    for name in top_level_imports(path):
        if not name.startswith("shardstate"):
            continue
        other = name.split(".")[1] if "." in name else "__init__"
        other = other if other in ORDER else "__init__"
        assert ORDER.index(other) <= ORDER.index(own), f"{path} imports {name}"


@pytest.mark.parametrize("own", sorted(PURE))
def test_pure_modules_import_nothing_that_touches_the_world(own):
    assert (
        EFFECTS & {name.split(".")[0] for name in top_level_imports(SOURCE / f"{own}.py")} == set()
    )


def test_only_what_is_declared_is_imported():
    declared = {"blake3", "click", "cryptography", "ml_dtypes", "msgspec", "numpy", "obstore"}
    declared |= {"rich"}
    requires = {
        r.split(">")[0].replace("-", "_")
        for r in metadata.requires("shardstate")
        if "extra" not in r
    }
    assert declared == requires
    used = set()
    for own, path in modules():
        if own in ("torch", "vllm"):
            continue  # extras of their own
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used.add(str(node.module).split(".")[0])
    extras = {"boto3", "botocore", "huggingface_hub"}  # imported on use
    assert used - set(sys.stdlib_module_names) - {"shardstate"} == declared | extras


def test_what_is_public():
    assert shardstate.__all__ == [
        "Access",
        "Checkpoint",
        "Problem",
        "Reading",
        "Report",
        "ShardStateError",
        "__version__",
        "bench",
        "copy",
        "inspect",
        "load",
        "open",
        "plan",
        "shard",
        "sign",
        "verify",
    ]
    assert (SOURCE / "py.typed").exists()
    assert metadata.version("shardstate") == shardstate.__version__


def test_importing_brings_no_torch_and_no_client_of_a_hub_or_cloud():
    heavy = ("torch", "vllm", "transformers", "huggingface_hub", "obstore", "boto3", "rich")
    heavy += ("cryptography",)
    code = (
        f"import sys, shardstate, shardstate.cli; print([m for m in {heavy} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_decisions_are_dated():
    pages = sorted((SOURCE.parent.parent / "docs" / "decisions").glob("*.md"))
    assert pages
    assert [page.name for page in pages if not page.name[:10].replace("-", "").isdecimal()] == []


def test_every_promise_of_security_names_tests_that_exist():
    tests = Path(__file__).parent
    table = (tests.parent / "SECURITY.md").read_text().split("## What is not promised")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| **")]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`([^`]+)`", row)
        assert named
        file = None
        for name in named:
            if name.startswith("make "):
                continue
            path, _, item = name.rpartition("::") if "::" in name else ("", "", name)
            if name.endswith(".py"):
                path, item = name, ""
            file = tests / path if path else file
            text = file.read_text()
            assert not item or f"class {item}" in text or f"def {item}(" in text, name
