"""Which way the tree looks: a table of allowed imports, read from the sources.

The arrow that may not be is train -> backends: it *is* "no reference model in memory".
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cli_fixtures as cli

ROOT = Path(__file__).resolve().parents[1]

LAYERS = {
    # what a number is, and how a name is spelt: import nothing of prift but each other
    0: {
        "__init__",
        "text",
        "store",
        "errors",
        "stats",
        "home",
        "native",
        "products",
        "extended",
        "ranks",
        "progress",
        "background",
        "store.spans",
        "store.versions",
        "agreement",
        "text.report",
        "store.process",
        "store.newfile",
        "store.nolinks",
        "store.notes",
        "store.roots",
        "store.stores",
        "store.invariants",
        "mapped",
        "memory",
        "threads",
        "signals",
        "order",
        "roles",
    },
    # one concern each, on top of those
    1: {
        "heads",
        "identity",
        "store.parts",
        "store.remote",
        "models",
        "placement",
        "headcheck",
        "packing",
        "packcheck",
        "fold",
        "chunk",
        "gradients",
        "wholechunk",
        "lora",
        "text.messages",
        "text.rows",
        "text.tokenizers",
        "weigher",
        "rules",
        "comparing",
        "methods",
        "anchor",
        "terms",
    },
    # the cache and the text, put together of their parts
    2: {
        "store.index",
        "cache",
        "store.writer",
        "text.formats",
        "text.encode",
        "text.whole",
        "text.chat",
        "output",
        "watch",
        "arguments",
        "normalizers",
        "presets",
    }
    | {"store.claims", "shards"},
    # examples, the loss, who runs the prior
    3: {"text.loader", "text.examples", "text.dataspec", "loss", "fused", "forward", "backends"}
    | {f"backends.{name}" for name in ("batches", "bodies", "prompts", "packing", "ways")}
    | {f"backends.{name}" for name in ("engine", "full", "hf", "ray_worker", "ray_data")}
    | {f"backends.vllm_{n}" for n in ("bounds", "engine", "log", "options", "selftest", "worker")}
    | {"backends.vllm"},
    # what the commands share
    4: {"request", "plan", "turns", "scoring"}
    | {"provenance", "choice", "sequences", "columns", "weighing", "scored", "sweep", "dataset"}
    | {"metrics", "trainer", "groups"}
    | {
        "store.inventory",
        "store.histograms",
        "store.verify",
        "store.problems",
        "store.partcheck",
        "store.doubles",
    }
    | {"store.merging", "store.compact", "store.copying", "store.gc"},
    # the two commands
    5: {"engines", "precompute", "deepcheck", "training_data", "export", "preview"}
    | {"stepcheck", "train"},
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}
"""Module -> layer. A module imports its own layer and those below it, and never in a circle."""


def source_of(folder: str) -> dict[str, Path]:
    """Modules below the folder by their dotted name, relative to it."""
    files = sorted((ROOT / folder).rglob("*.py"))
    names = [f.relative_to(ROOT / folder).with_suffix("").as_posix() for f in files]
    dotted = [n.replace("/", ".").removesuffix(".__init__") for n in names]
    return dict(zip(dotted, files, strict=True))


PRODUCTS = {"errors", "home", "native", "products"}
NUMBERS = PRODUCTS | {
    "extended",
    "stats",
    "heads",
    "headcheck",
    "fold",
    "chunk",
    "wholechunk",
    "weigher",
}
LOSS = NUMBERS | {"anchor", "terms", "gradients"}
CACHE = {
    "errors",
    "home",
    "store.versions",
    "identity",
    "store.spans",
    "store.parts",
    "store.newfile",
    "store.nolinks",
    "store.notes",
    "cache",
    "store.writer",
    "background",
}
CACHE |= {
    "store.process",
    "store.claims",
    "store.roots",
    "store.stores",
    "store.remote",
    "store.index",
}
TEXT = {
    "errors",
    "progress",
    "text.report",
    "text.messages",
    "text.rows",
    "text.tokenizers",
    "text.formats",
    "text.encode",
}
TEXT |= {"roles", "text.whole", "text.chat", "text.loader", "text.examples"}
REACH = {
    # what a module may know, directly or through others
    **{name: TEXT for name in TEXT},
    **{name: CACHE for name in CACHE},
    **{name: PRODUCTS for name in PRODUCTS},
    "stats": {"extended"},
    "heads": PRODUCTS,
    "headcheck": PRODUCTS | {"heads"},
    "fold": PRODUCTS | {"heads", "extended", "stats"},
    "weigher": {"errors", "extended", "stats"},
    "rules": {"errors", "roles", "extended", "stats", "weigher"},
    "comparing": {"errors", "roles", "extended", "stats", "weigher", "rules"},
    "anchor": set(),
    "terms": {"errors", "extended", "stats", "weigher", "anchor"},
    "chunk": PRODUCTS | {"heads", "extended", "stats", "fold"},
    "wholechunk": PRODUCTS | {"heads", "extended", "stats", "fold"},
    "gradients": PRODUCTS | {"heads", "extended", "stats", "fold", "chunk", "wholechunk"},
    "loss": LOSS,
    "fused": LOSS | {"loss", "memory"},
    "packing": PRODUCTS | {"heads"},
    "packcheck": PRODUCTS | {"heads", "headcheck", "memory", "packing"},
    "forward": LOSS | {"loss", "packing", "roles"},
    "backends": NUMBERS | {"identity", "store.versions"},
    "backends.batches": set(),
    "memory": {"errors"},
    "signals": set(),
    "order": set(),
    **{
        f"backends.{n}": NUMBERS
        | {f"backends{m}" for m in ("", ".batches", ".bodies")}
        | {"models"}
        for n in ("bodies", "engine", "full")
    },
    **{
        f"backends.{n}": NUMBERS
        | {f"backends{m}" for m in ("", ".batches", ".bodies")}
        | {"models", "packing"}
        for n in ("prompts", "packing")
    },
    "backends.vllm_worker": NUMBERS | {"backends", "identity", "store.versions", "store.process"},
    "backends.vllm_bounds": NUMBERS | {"backends", "identity", "store.versions"},
    "backends.vllm_engine": NUMBERS
    | {f"backends{n}" for n in ("", ".vllm_log", ".vllm_worker")}
    | {"identity", "store.versions", "store.process"},
    "backends.vllm_log": NUMBERS | {"backends", "identity", "store.versions"},
    "models": {"errors"},
    "placement": {"errors", "models"},
}
"""The text knows no tensors, the cache knows no text and no model, a backend knows only ids."""

MODULES = {name: path for name, path in source_of("prift").items() if name != "__main__"}


def imports(path: Path) -> set[str]:
    """Everything that the file imports, anywhere in it: dotted names, members included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent.name == "cli", f"{path}: relative import"
            module = node.module or "prift_cli"
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def own_imports(name: str) -> set[str]:
    """The modules of prift that a module of prift imports."""
    found = {i.removeprefix("prift.") for i in imports(MODULES[name]) if i.startswith("prift.")}
    return found & set(MODULES)


def reachable(name: str) -> set[str]:
    seen, todo = set(), [name]
    while todo:
        new = own_imports(todo.pop()) - seen
        seen |= new
        todo += new
    return seen


def test_the_table_names_every_module():
    assert set(LAYER) == set(MODULES), "a module was added or removed: say here where it belongs"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_look_down(name):
    for other in own_imports(name):
        assert LAYER[other] <= LAYER[name], f"prift.{name} may not import prift.{other}"
    assert name not in reachable(name), f"prift.{name} imports itself in a circle"


@pytest.mark.parametrize("name", sorted(REACH))
def test_what_a_module_knows(name):
    assert reachable(name) <= REACH[name] | {"__init__", "text", "store"}


@pytest.mark.parametrize("name", sorted(TEXT | CACHE))
def test_text_and_cache_know_no_tensors(name):
    assert "torch" not in {i.split(".")[0] for i in imports(MODULES[name])}


def test_the_reader_of_imports_reads_them():
    assert {"training_data", "trainer", "output"} <= own_imports("train")
    assert "backends.hf" in own_imports("engines")  # `from prift.backends import ... hf`
    assert {"stats", "weigher", "heads"} <= reachable("train")


def test_training_never_reaches_a_backend():
    forbidden = {name for name in MODULES if name.split(".")[0] == "backends"}
    assert {"backends", "backends.hf"} < forbidden
    assert not (reachable("train") | reachable("arguments")) & forbidden


def test_the_library_never_imports_its_command_line():
    for path in MODULES.values():
        for name in imports(path):
            assert name.split(".")[0] not in ("prift_cli", "cli", "click"), path


def test_the_command_line_imports_nothing_heavy_at_its_top():
    """`prift --help` would import it; inside a command it is imported where it is used."""
    light = {"click", "prift", "prift.errors", "prift.text.dataspec", "prift_cli"}
    for path in source_of("cli").values():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert name in light or name.split(".")[0] in sys.stdlib_module_names, path


def test_only_precompute_and_its_backends_know_backends():
    users = {name for name in MODULES if "backends" in {n.split(".")[0] for n in own_imports(name)}}
    assert {"engines", "backends.hf"} <= users
    outside = {name for name in users if name.split(".")[0] != "backends"}
    assert outside == {"engines", "scoring", "deepcheck"}


TRAIN = """
import sys
from prift_cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code in (0, None), end.code
assert "prift.trainer" in sys.modules
print("backends:", [name for name in sys.modules if name.startswith("prift.backends")])
"""


def test_no_backend_is_ever_loaded_while_training(tmp_path):
    """End to end, in a process of its own: the prior's model folder is not even there any more."""
    prior, trainee = cli.make_model(tmp_path / "prior"), cli.make_model(tmp_path / "trainee")
    data = cli.write_rows(tmp_path / "rows.jsonl")
    cli.succeeded(cli.precompute(prior, data, tmp_path / "cache"))
    for file in Path(prior).iterdir():
        file.unlink()
    Path(prior).rmdir()
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, "train", "--model", trainee, "--data", data]
        + ["--cache", tmp_path / "cache", "--method", "prift-mass", "--output", tmp_path / "out"]
        + ["--eval-data", data, "--", "--max_steps", "2", "--logging_steps", "1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "backends: []"
    assert (tmp_path / "out" / "model.safetensors").is_file()
