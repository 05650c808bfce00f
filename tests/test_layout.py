"""The house rules that a machine can check. The rooms and who may import whom are read from AGENTS.md."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kl_alliteration"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for name in ("recipes", "studies", "benchmarks") for path in (ROOT / name).glob("*.py"))
LIBRARY = [path for path in MODULES if "lab" not in path.relative_to(PACKAGE).parts]


def read_rooms(text: str) -> dict[str, tuple[set[str], set[str]]]:
    """Room to the rooms and the packages that it may import, from the table of AGENTS.md."""
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            (name,) = re.findall(r"`([^`]+)`", cells[0])
            allowed = {word for word in re.split(r",\s*", cells[2]) if word}
            rooms = {word.strip("`") for word in allowed if word.startswith("`")}
            rows[name] = rooms, {word for word in allowed if not word.startswith("`")}
    return rows


ROOMS = read_rooms((ROOT / "AGENTS.md").read_text())


def room_of(module: str, rooms) -> str | None:
    """The row of a module, named by its path without `.py`: its own, or that of the nearest folder."""
    if module in rooms:
        return module
    folders = [f"{'/'.join(module.split('/')[:n])}/" for n in range(module.count("/"), 0, -1)]
    return next((folder for folder in folders if folder in rooms), None)


def module_name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imported_modules(path: Path) -> set[str]:
    """This package's modules by their paths without `.py`, other packages by their first name."""
    found, package = set(), path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.Import):
            found |= {name.split(".")[0] for name in names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            for name in names:
                for parts in ([*base, name], base):
                    place = PACKAGE.joinpath(*filter(None, parts))
                    if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
                        inside = place if place.with_suffix(".py").is_file() else place / "__init__"
                        found.add(inside.relative_to(PACKAGE).as_posix())
                        break
    return found - sys.stdlib_module_names


def unlawful(path: Path, rooms) -> list[str]:
    """What a module imports and its row does not allow."""
    room = room_of(module_name(path), rooms)
    allowed_rooms, allowed_packages = rooms[room]
    wrong = []
    for name in imported_modules(path):
        if (PACKAGE / f"{name}.py").is_file():
            other = room_of(name, rooms)
            if other != room and other not in allowed_rooms:
                wrong.append(f"`{other}`")
        elif name not in allowed_packages:
            wrong.append(name)
    return sorted(wrong)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_what_its_row_allows(path):
    assert room_of(module_name(path), ROOMS) is not None, f"{module_name(path)} has no row in AGENTS.md"
    assert unlawful(path, ROOMS) == []


def test_every_row_has_a_module_and_nothing_that_is_not_imported():
    used = {name: set() for name in ROOMS}
    for path in MODULES:
        room = room_of(module_name(path), ROOMS)
        for name in imported_modules(path):
            used[room].add(room_of(name, ROOMS) if (PACKAGE / f"{name}.py").is_file() else name)
    inhabited = {room_of(module_name(path), ROOMS) for path in MODULES}
    assert set(ROOMS) == inhabited
    for name, (rooms, packages) in ROOMS.items():
        assert (rooms | packages) - used[name] == set(), f"{name} does not import all that its row says"


def test_the_table_is_what_is_read():
    """A row less, an import less, a row more: each is seen."""
    text = (ROOT / "AGENTS.md").read_text()
    without_row = read_rooms(re.sub(r"\| `guard` .*\n", "", text))
    assert room_of("guard", without_row) is None
    without_import = read_rooms(text.replace("| `kl`, `_trl/`, `text`, transformers |", "| `kl`, `_trl/` |"))
    assert unlawful(PACKAGE / "guard.py", without_import) == ["`text`", "transformers"]
    assert "cellar" in read_rooms(text + "| `cellar` | nothing | torch |\n")


def test_the_library_knows_nothing_of_the_lab():
    assert not [name for name, (rooms, _) in ROOMS.items() if "lab" not in name and any("lab" in r for r in rooms)]
    assert LIBRARY and not [p.name for p in LIBRARY if any(name.startswith("lab/") for name in imported_modules(p))]


def test_rooms_stay_small():
    lines = {module_name(path): len(path.read_text().splitlines()) for path in MODULES}
    assert max(lines.values()) <= 350, lines
    assert max(count for name, count in lines.items() if name.startswith("_trl/")) <= 200


def test_no_class_of_the_seam_has_more_than_a_dozen_attributes(make_trainer):
    from kl_alliteration._trl import seam_of

    seam = seam_of(make_trainer())
    assert max(len(vars(each)) for each in (seam, seam.scorer)) <= 12


PRIVATE = [path for path in MODULES + SCRIPTS if path.parent.name not in ("_trl", "benchmarks")]


@pytest.mark.parametrize("path", PRIVATE, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_private_names_of_the_trainer_and_of_torch_live_behind_their_doors(path):
    assert not re.search(r"trainer\._[a-z]", path.read_text())
    assert path.name == "packed.py" or not re.search(r"torch\.ops\.", path.read_text())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_scripts_are_public_and_recipes_are_short(path):
    assert "kl_alliteration._" not in path.read_text()
    assert path.parent.name != "recipes" or len(path.read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_launch_configs_hold_launch_strategy_only(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = yaml.safe_load(path.read_text())
    assert not set(config) & {"learning_rate", "beta", "batch_size", "gradient_accumulation_steps"}
    assert load_config_from_file(str(path)).num_processes == config["num_processes"]


def test_importing_the_library_changes_nothing_of_the_user_s():
    """In a process of its own: no figures, no threads, no filters, no lab."""
    code = """
import sys, warnings, torch, transformers, trl, peft
from trl import RLOOTrainer
def state():
    filters, verbosity = list(warnings.filters), transformers.logging.get_verbosity()
    return torch.get_num_threads(), filters, torch.get_default_dtype(), verbosity
before = state()
import kl_alliteration
kl_alliteration.KLPenalty
assert state() == before, (before, state())
assert not {"matplotlib", "kl_alliteration.lab"} & set(sys.modules), "imported"
print("unchanged")
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "unchanged", done.stderr[-2000:]
