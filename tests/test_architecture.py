"""The arrows between the rooms, and the names that hold the registries together."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import infold

ROOT = Path(infold.__file__).parent
FREE = {
    "errors",
    "version",
    "dtypes",
    "sizes",
    "workers",
    "machine",
    "patience",
    "leash",
    "conversion",
    "interval",
    "child",
    "ggml",
    "names",
    "disk",
    "extras",
}  # every room may import these
LEAVES = {"adapters", "formats", "checkpoint"}
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "sizes": set(),
    "workers": set(),
    "patience": set(),
    "leash": set(),
    "conversion": set(),
    "interval": set(),
    "child": set(),
    "names": set(),
    "disk": set(),
    "extras": set(),
    "ggml": set(),
    "machine": set(),
    "dtypes": set(),
    "kernel": set(),
    "adapters": set(),
    "formats": set(),
    "checkpoint": set(),
    "plan": LEAVES,
    "edit": {"adapters", "formats", "kernel"},
    "merge": LEAVES | {"plan", "edit"},
    "verify": LEAVES | {"plan", "tuners"},
    "tuners": LEAVES | {"edit"},
    "inspect": LEAVES | {"plan"},
    "bench": LEAVES | {"tuners"},
    "methods": LEAVES | {"tuners"},
    "loop": LEAVES | {"plan", "edit", "merge", "tuners", "verify", "inspect"},
    "deploy": LEAVES | {"inspect", "verify"},
    "report": set(),
    "api": LEAVES
    | {"plan", "edit", "merge", "tuners", "verify", "inspect", "bench", "methods"}
    | {"deploy", "report"},
    "cli": LEAVES
    | {"api", "plan", "edit", "merge", "tuners", "verify", "inspect", "bench", "methods", "loop"}
    | {"deploy", "report", "kernel"},
}


def rooms_imported_by(file: Path) -> set[str]:
    """Rooms of infold that a file imports, also inside functions and for type checking."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write infold.room"
            names = [node.module or ""]
            if node.module == "infold":
                names = [f"infold.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("infold.")}
    return rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_follow_the_arrows(room: str) -> None:
    place = ROOT / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]

    wrong = {
        str(file.relative_to(ROOT)): sorted(extra)
        for file in files
        if (extra := rooms_imported_by(file) - MAY_IMPORT[room] - FREE - {room})
    }

    assert wrong == {}


def test_every_room_has_its_arrows() -> None:
    found = {m.name for m in pkgutil.iter_modules([str(ROOT)]) if not m.name.startswith("__")}

    assert found == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("infold.verify.weights", ("infold.merge.", "infold.edit")),
        # the controls of `outputs` are merged by the tuners, so by `edit`
        ("infold.verify.outputs, infold.verify.both", ("infold.merge.",)),
    ],
)
def test_verify_runs_without_merge_being_loaded(modules: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {modules}; print([m for m in sys.modules if m.startswith({absent})])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert loaded.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("room", "registry"),
    [
        ("adapters", "METHODS"),
        ("formats", "FORMATS"),
        ("formats", "SCALES"),
        ("formats", "QUANTIZED"),
        ("formats.values", "VALUES"),
    ],
)
def test_registry_keys_are_file_names(room: str, registry: str) -> None:
    table = getattr(importlib.import_module(f"infold.{room}"), registry)

    assert {name: module.__name__ for name, module in table.items()} == {
        name: f"infold.{room}.{name}" for name in table
    }


def test_the_facts_of_the_methods_fit_together() -> None:
    from infold.adapters import METHODS, methods_of

    meaning: dict[str, str] = {}
    for name, method in METHODS.items():
        assert {*method.REQUIRED, *method.ON_BIAS} == set(method.PARTS), name
        assert {method.TABLE.get(p, p) for p in method.KEYS.values()} == set(method.PARTS), name
        assert set(method.TABLE.values()) <= set(method.PARTS), name
        for key, part in method.KEYS.items():
            assert key.startswith(".") and meaning.setdefault(key, part) == part, key
        for kind in method.PEFT_TYPES:
            chosen = {"use_dora": name == "dora"}
            owners = [n for n, m in methods_of(kind).items() if m.owns(method.REQUIRED, chosen)]
            assert owners == [name], "no two methods claim the same module"
    assert not methods_of("UNKNOWN")


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_loads_no_torch(argument: str) -> None:
    code = (
        f"import sys; sys.argv = ['infold', {argument!r}]\n"
        "from infold.cli.main import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ran.stdout.splitlines()[-1] == "False"


def test_importing_infold_and_its_types_loads_no_torch() -> None:
    code = (
        "import sys, infold\n"
        "print(infold.Receipt.__name__, infold.Verdict.__name__, infold.Offender.__name__)\n"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ran.stdout.splitlines() == ["Receipt Verdict Offender", "False"]


def test_the_verbs_stay_callable_when_the_rooms_of_the_same_name_are_loaded() -> None:
    for name in ("infold.merge.run", "infold.verify.weights", "infold.inspect.describe"):
        importlib.import_module(name)

    assert all(callable(getattr(infold, verb)) for verb in ("merge", "verify", "inspect"))


def test_public_names_exist() -> None:
    assert [name for name in infold.__all__ if not hasattr(infold, name)] == []
    assert sorted(infold.__all__) == infold.__all__ or set(infold.__all__) <= set(dir(infold))


def code_of(*folders: Path) -> dict[str, ast.Module]:
    """The parsed files of folders by module names, of infold's own as they are imported."""
    found = {}
    for folder in folders:
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder.parent).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts)] = ast.parse(file.read_text())
    return found


def listed(tree: ast.Module) -> set[str] | None:
    """The names in __all__; None where a module has none, as the verbs, and what stands in a table
    and has the names of a protocol."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return None


def taken_by(tree: ast.Module, modules: set[str]) -> set[tuple[str, str]]:
    """(module, name) of what a file takes of these modules: imported, or as an attribute of one."""
    taken, called = set(), {}
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (whole := f"{node.module}.{alias.name}") in modules:
                    called[alias.asname or alias.name] = whole
                else:
                    taken.add((node.module or "", alias.name))
        elif isinstance(node, ast.Import):
            called |= {alias.asname or alias.name: alias.name for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            if (module := called.get(ast.unparse(node.value))) is not None:
                taken.add((module, node.attr))
    return taken


def of_signatures(tree: ast.Module, names: set[str]) -> set[str]:
    """The types of what listed functions and classes take, give and hold."""
    own = [node for node in tree.body if getattr(node, "name", None) in names]
    parts = [part for node in own for part in ast.walk(node)]
    told = [getattr(part, of, None) for part in parts for of in ("annotation", "returns")]
    nodes = [node for one in told if isinstance(one, ast.AST) for node in ast.walk(one)]
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def test_all_lists_what_others_take_and_nothing_else() -> None:
    """What is listed is the module's own word of what others may rely on. Rooms list their seam,
    and what stands in a table lists its protocol, for those who come."""
    from infold import adapters, formats
    from infold.formats import values
    from infold.loop.config import BUILT_IN

    tables = (adapters.METHODS, formats.FORMATS, formats.SCALES, formats.QUANTIZED, values.VALUES)
    seams = {module.__name__ for table in tables for module in table.values()}
    seams |= {f"infold.loop.{name}" for name in BUILT_IN}
    project = Path(__file__).parent.parent
    ours = code_of(ROOT)
    others = code_of(*(project / name for name in ("tests", "benchmarks", "examples")))
    names = set(ours)
    inside = {name: taken_by(tree, names) for name, tree in ours.items()}
    outside = set().union(*(taken_by(tree, names) for tree in others.values()))

    wrong = []
    for module, tree in ours.items():
        if (own := listed(tree)) is None:
            continue
        theirs = [found for name, found in inside.items() if name != module]
        taken = {name for found in theirs for of, name in found if of == module}
        wrong += [f"{module}: {name} is taken and not listed" for name in sorted(taken - own)]
        if module in seams or (ROOT.parent / module.replace(".", "/")).is_dir():
            continue
        known = taken | {name for of, name in outside if of == module} | of_signatures(tree, own)
        wrong += [f"{module}: {name} is listed and not taken" for name in sorted(own - known)]

    assert wrong == [], "\n".join(wrong)


def test_no_file_grows_beyond_reading() -> None:
    long = {
        str(file.relative_to(ROOT)): count
        for file in ROOT.rglob("*.py")
        if (count := len(file.read_text().splitlines())) > 600
    }

    assert long == {}
