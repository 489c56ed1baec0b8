"""Walls that hold the design: who may import what, and what a lab leads to."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "benchmark").rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_harness_imports_no_particular_attack_or_defense(path):
    assert not {name for name in imports(path) if name.split(".")[0] in ("attacks", "defenses")}


def test_only_the_model_and_its_prompts_come_from_open_clip():
    users = {str(path.relative_to(ROOT)) for path in MODULES if any(name.split(".")[0] == "open_clip" for name in imports(path))}
    assert users == {"benchmark/train/model.py", "benchmark/data/prompts.py"}


@pytest.mark.parametrize("path", [*MODULES, *(ROOT / "attacks").glob("*.py"), *(ROOT / "defenses").glob("*.py")], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path):
    calls = {node.func.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"eval", "exec"}
    assert "pickle.load" not in path.read_text()
    assert "torch.load(" not in path.read_text() or "weights_only=True" in path.read_text()


def test_importing_the_program_changes_no_global_and_loads_no_torch():
    code = (
        "import sys\n"
        "import benchmark, benchmark.cli\n"
        "assert 'torch' not in sys.modules\n"
        "import random, open_clip, pandas, pyarrow, sklearn.metrics, scipy.stats, torch\n"
        "random.seed(3); before = random.getstate()\n"
        "import numpy; numpy.random.seed(3); words = numpy.random.get_state()[1].tolist()\n"
        "torch.manual_seed(3); bits = torch.get_rng_state()\n"
        "import benchmark.cell, benchmark.train.loop, attacks.backdoor, defenses.roclip\n"
        "from PIL import Image, ImageFile\n"
        "assert random.getstate() == before and numpy.random.get_state()[1].tolist() == words and torch.equal(torch.get_rng_state(), bits)\n"
        "assert not ImageFile.LOAD_TRUNCATED_IMAGES\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
