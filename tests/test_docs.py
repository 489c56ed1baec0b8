"""What the documents show is true: commands parse, help is current, code runs, links lead somewhere."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmark import cli
from benchmark.settings import SCALES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
BENCH = str(Path(sys.executable).with_name("bench"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "results" / "README.md"])


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    indented = re.findall(r"^    (bench .*)$", text, re.MULTILINE)
    inline = [" ".join(span.split()) for span in re.findall(r"`(bench run [^`]+)`", text) if "..." not in span]
    lines = [*"".join(blocks(text, "sh")).splitlines(), *indented, *inline]
    return [part.partition(" #")[0].strip() for line in lines for part in line.split("&&") if part.strip()]


METHODS = sorted((ROOT / "docs" / "methods").glob("*.md"))
RECIPES = sorted((ROOT / "results" / "recipes").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md")), *METHODS, *RECIPES]
COMMANDS = list(dict.fromkeys(command for path in PAGES for command in commands(path.read_text())))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def test_the_readme_shows_the_help_of_the_command() -> None:
    shown = blocks(README, "text")
    printed = subprocess.run([BENCH, "--help"], env=environment(), capture_output=True, text=True, check=True).stdout
    assert [block.strip() for block in shown] == [printed.strip()]


def test_the_readme_shows_enough_commands() -> None:
    assert sum(command.startswith("bench run") for command in commands(README)) >= 3
    assert any(command.startswith("bench report") for command in commands(README))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_the_documents_is_understood(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planned: list[Any] = []
    monkeypatch.setattr(cli, "_run_cells", lambda cells, *_: planned.extend(cells))
    runner = CliRunner()
    for kind, name in (("defense", "mine"), ("defense", "pool_match"), ("attack", "my_attack")):
        runner.invoke(cli.app, ["new", kind, name], catch_exceptions=False)
    program, *arguments = shlex.split(command)
    assert program == "bench"
    if arguments[0] == "new":
        arguments += ["--folder", "."]
        (tmp_path / f"{arguments[2]}.py").unlink()
    elif arguments[0] not in ("run", "show"):
        arguments.append("--help")  # unknown options and commands are refused before help is shown
    result = runner.invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert bool(planned) == (arguments[0] == "run")


READ_ONLY = [
    command for command in COMMANDS if command.split()[1] in ("report", "compare", "plan", "list", "status") and "--pictures" not in command
]  # pictures are made by poisoning anew


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as a reader would have it after a few runs: the committed tables, and some of their runs as the reader's own."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "results" / "runs").mkdir(parents=True)
    (folder / "results" / "reference").symlink_to(ROOT / "results" / "reference")
    cells = set()  # both tables have some, made by code of different days
    for table in ("main", "dose"):
        for run in (ROOT / "results" / "reference" / table / "runs").iterdir():
            record = json.loads((run / "record.json").read_text())
            label = record["label"]
            cell = (*label.values(), record["resolved"]["seed"])
            if label["attack"].startswith("backdoor") and label["defense"] in ("clip", "clip+aug", "roclip") and cell not in cells:
                cells.add(cell)
                (folder / "results" / "runs" / run.name).symlink_to(run)
    return folder


@pytest.mark.parametrize("command", READ_ONLY)
def test_a_command_that_only_reads_does_what_the_documents_say(command: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    arguments = shlex.split(command)[1:]
    written = None
    if "--out" in arguments:
        at = arguments.index("--out") + 1
        written = tmp_path / Path(arguments[at]).name
        arguments[at] = str(written)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, f"{result.output}{result.exception}"
    assert written.stat().st_size > 100 if written is not None else result.output.strip()
    assert "0 differences" in result.output or "--verify" not in command


def test_generated_parts_of_the_documents_are_what_the_committed_results_say() -> None:
    from benchmark.report.reproduction import filled

    for name in ("reproduction.md", "metrics.md"):
        page = (ROOT / "docs" / name).read_text()
        assert "<!-- end -->" in page
        assert filled(page, ROOT / "results") == page, f"python -m benchmark.report.reproduction docs/{name}"


def test_commands_that_check_what_is_committed_do_what_the_documents_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shown = {command.split()[1]: command for command in commands((ROOT / "docs" / "reproduction.md").read_text())}
    compared = CliRunner().invoke(cli.app, shlex.split(shown["compare"])[1:], catch_exceptions=False)
    assert compared.exit_code == 0 and "defense.name: roclip -> clip" in compared.output and "asr/targeted" in compared.output
    checked = CliRunner().invoke(cli.app, ["report", "--verify", "--results", "results/reference/stronger"], catch_exceptions=False)
    assert checked.exit_code == 0 and "0 differences" in checked.output
    planned = CliRunner().invoke(cli.app, ["plan", "results/reference/stronger/grid.toml", "--results", "results/reference/main"], catch_exceptions=False)
    assert planned.exit_code == 0 and "12 cells, 3 runs of each" in planned.output


def test_an_option_that_does_not_exist_is_refused_before_help_is_shown() -> None:
    assert CliRunner().invoke(cli.app, ["report", "--formt", "csv", "--help"]).exit_code == 2


def test_the_python_of_the_readme_names_what_there_is() -> None:
    (block,) = blocks(README, "python")
    compile(block, "README.md", "exec")
    lines = [line for line in block.splitlines() if line.startswith(("from ", "import "))]
    assert lines
    exec("\n".join(lines), {})


def test_the_scales_of_the_readme_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \w[^|]*\| (\d+) px \| `([^`]+)` \| (\d+) \| (\d+) \|", README, re.MULTILINE)
    shown = {name: (int(pairs.replace(",", "")), int(side), model, int(epochs), int(batch)) for name, pairs, side, model, epochs, batch in rows}
    assert shown == {name: (scale.data.n_pairs, scale.data.side, scale.model.name, scale.train.epochs, scale.train.batch_size) for name, scale in SCALES.items()}


def test_the_defense_of_the_contributing_page_trains(tmp_path: Path) -> None:
    (name, code), *others = re.findall(r"<!-- plugin: (\S+) -->\n```python\n(.*?)^```$", CONTRIBUTING, re.DOTALL | re.MULTILINE)
    assert not others
    (tmp_path / name).write_text(code)
    tiny = (
        "data.n_pairs=256",
        "data.n_test=100",
        "data.n_probe=200",
        "data.n_held_out=64",
        "data.n_clean=64",
        "train.epochs=2",
        "train.batch_size=32",
        "evaluation.linear_probe=none",
    )
    sets = [part for one in tiny for part in ("--set", one)]
    arguments = ["run", "--attack", "backdoor", "--defense", f"./{name}", "--scale", "smoke", "--results", "results", "--jobs", "1", "--no-baseline", "--device", "cpu", *sets]
    done = subprocess.run([BENCH, *arguments], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results" / "runs").glob("*/record.json")
    plain, matched = json.loads(path.read_text())["curve"]
    assert (plain["phase"], matched["phase"]) == ("clip", "match")
    assert matched["match_cos_mean"] >= matched["own_cos_mean"]
    assert "match_cos_mean" not in plain


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_of_the_project(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_every_plugin_has_a_page_or_is_a_control() -> None:
    from benchmark.registry import find, names

    files = list((ROOT / "docs" / "methods").glob("*.md"))
    pages = {path.stem for path in files} | {name for path in files for name in re.findall(r"^## `(\w+)`$", path.read_text(), re.MULTILINE)}
    without = {name for name in names("defense") if find("defense", name).load().kind == "control"} | {"none"}
    assert {*names("attack"), *names("defense")} - without <= pages
