"""The order of the house: imports point down, twins match, files are short, kernels stay leaves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from qattn import _cache

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qattn"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up; a file imports from its own floor or from those below.
FLOORS = [
    ("errors", "_changes", "_modules"),
    ("_check", "_backend", "_index", "_cache", "_meaning", "layout", "devices", "batch", "logits", "cache_types"),
    ("formats", "masks", "preparation"),
    ("rope",),
    ("cpu", "cuda"),
    ("gguf_strings", "gguf_header", "array"),
    ("gguf_file", "packing", "quantize"),
    ("backends",),
    ("kv_cache",),
    ("ops",),
    ("softmax_attention", "linear", "architectures"),
    ("state", "head_steps", "projection", "latent", "probe"),
    ("layer_weights",),
    ("attention", "capabilities"),
    ("gguf_attention",),
    ("introspect",),
    ("models", "plot"),
    ("cli",),
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}


def imports(path, *, inside_functions=True):
    """The modules that a file imports, as dotted names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if inside_functions else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            names = [alias.name for alias in node.names]
            yield from (f"{node.module}.{name}" for name in names) if node.module == "qattn" else [node.module]


def room(module):
    """The part of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    mine = room(module_of(path))
    if mine in ("__init__", "__main__"):
        return
    assert mine in FLOOR, f"{path} stands on no floor"
    for module in imports(path):
        if module.split(".")[0] == "qattn" and room(module) != mine:
            floor = FLOOR.get(room(module), FLOOR["models"])  # a public name, which the package's face exports
            assert floor <= FLOOR[mine], f"{path} imports {module}, which stands above it"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in ("cpu", "cuda")], ids=module_of)
def test_kernels_know_no_format_mask_or_layer(path):
    compiled_in = [name.removesuffix(".py") for name in _cache.COMPILED_IN if "/" not in name]
    rooms = [path.parent.name, *compiled_in, "errors", "devices", "_cache"]  # so the code on disk is of these sources
    for module in imports(path):
        assert not module.startswith("qattn.") or room(module) in rooms, module


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda path: path.name)
def test_files_end_at_500_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_print_and_no_assert_in_the_library(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno} asserts; raise an error instead"
        if "cli" not in path.parts and isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") != "print", f"{path}:{node.lineno} prints"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_every_module_and_public_definition_is_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.read_text().strip():
        assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            snippets = ("code", "shared", "step", "scale_bits", "offset_bits", "offset_step")
            snippet = "formats" in path.parts and node.name in snippets
            assert snippet or ast.get_docstring(node), f"{path}: {node.name} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_functions_have_types_unless_numba_finds_them(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            compiled = node.decorator_list or node.name in ("_bind", "thunk")
            assert node.returns or compiled, f"{path}:{node.lineno}: {node.name} has no types"


def test_importing_takes_no_extra_and_no_gpu():
    code = "import sys, qattn; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in done.stdout.split()} | set(done.stdout.split())
    assert not loaded & {"cupy", "numba.cuda", "tokenizers", "jinja2", "rich", "matplotlib", "mpi4py", "torch"}


def test_nothing_is_compiled_at_import():
    code = (
        "from numba.core import event\n"
        "with event.install_recorder('numba:compile') as recorder:\n"
        "    import qattn, qattn.models, qattn.formats\n"
        "    qattn.formats.names()\n"
        "print(len(recorder.buffer))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "0"
