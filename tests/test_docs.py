"""What the documents say is so: commands parse, options and modules exist, links lead somewhere; Python: `test_pages`."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import fedsim
from fedsim import algorithms, data
from fedsim.cli import main as cli
from fedsim.cli import sweeping
from fedsim.cli.options import CostOptions, ProfileOptions, RunOptions, ShowOptions, parse, parse_alone
from fedsim.cli.privacy import PrivacyOptions
from fedsim.cli.privacy import check as check_privacy
from fedsim.config import Config, Speed, main_job
from fedsim.profiling import profile
from fedsim.simulation.loaded import Run

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
EXPERIMENTS = sorted(ROOT.glob("experiments/**/*.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PIP_TEST = "pip install -e '.[test]' && pytest"


def blocks(document: Path, language: str) -> list[str]:
    """Code blocks of a language, in order."""
    return [body for tag, body in FENCE.findall(document.read_text(encoding="utf-8")) if tag == language]


def commands(document: Path) -> Iterator[list[str]]:
    """Every `fedsim ...` of the shell blocks and of inline code, as words."""
    text = document.read_text(encoding="utf-8")
    lines = [line for body in blocks(document, "bash") for line in body.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(fedsim [^`\n]+)`", FENCE.sub("", text))
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words[:1] == ["fedsim"]:
                yield words[1:]


COMMANDS = [(d, words) for d in DOCUMENTS for words in commands(d)]
COMMANDS += [
    (file, shlex.split(line.strip())[1:])
    for file in EXPERIMENTS
    for line in re.findall(
        r"(fedsim (?:run|check|sweep) [^\n]*?)(?:  +\(.*)?\n", ast.get_docstring(ast.parse(file.read_text())) or ""
    )
]


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses one command as the command line would, up to the work; raises what the command line reports."""
    monkeypatch.chdir(ROOT)
    command, argv = words[0], words[1:]
    assert command in cli.COMMANDS or command.startswith("-"), f"no command {command}"
    if command == "run" or words[:2] == ["data", "show"]:
        kind = RunOptions if command == "run" else ShowOptions
        options = parse(kind, argv if command == "run" else argv[1:], "fedsim")
        config = options.config()
        if command == "run" and options.resume is None:
            algorithms.find(config.algorithm)
    elif command == "profile":
        options = parse(ProfileOptions, argv, "fedsim profile")
        options.config()
        profile.parse_sweep(options.sweep)
    elif command == "sweep":
        sweeping.read(argv)
    elif command == "cost":
        CostOptions.parsed(argv).configs()
    elif command == "privacy" and argv:
        check_privacy(parse_alone(PrivacyOptions, argv, "fedsim privacy"))
    elif command == "check" and argv:
        algorithms.find(argv[0])
    elif command == "list":
        assert argv[:1] in ([], *([kind] for kind in cli.KINDS))
    elif command == "data":
        assert argv[:1] in ([], ["fetch"], ["list"], ["prepare"], ["show"])


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=lambda v: " ".join(v) if isinstance(v, list) else v.name)
def test_command_parses(where: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that is renamed breaks its documents here."""
    words = [w for w in words if w not in ("...", "…")]
    if "my.py:fed_mine" in words or "--help" in words or any(w.isupper() for w in words):
        pytest.skip("a pattern, not a command")
    try:
        parsed(words, monkeypatch)
    except SystemExit as stop:
        pytest.fail(f"{where.name}: fedsim {' '.join(words)} is refused ({stop.code})")


def test_refuses_a_command_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        parsed(["run", "--no-such-option", "1"], monkeypatch)
    with pytest.raises(ValueError, match="own_algoritm"):
        parsed(["run", "--algorithm", "experiments/own_algoritm.py:fed_mine"], monkeypatch)


def test_there_are_commands_to_test() -> None:
    readme, hour = ([w for where, w in COMMANDS if where.name == name] for name in ("README.md", "first_hour.md"))
    assert len(readme) >= 8 and len(hour) >= 10
    assert ["run"] in readme


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_options_exist(document: Path) -> None:
    """Every `--option` in the prose is one of fedsim's; a benchmark's own stands behind its name, `run.py --small`."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit):
        parse(RunOptions, ["--help"], "fedsim run")
    with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit):
        CostOptions.parsed(["--help"])
    with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit):
        parse(ProfileOptions, ["--help"], "fedsim profile")
    with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit):
        sweeping.value(["--help"], Config(), Speed())
    with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit):
        parse_alone(PrivacyOptions, ["--help"], "fedsim privacy")
    known = set(re.findall(r"--[a-z][a-z-]*", help_text.getvalue()))
    others = {"--help", "--debug", "--exclude-editable"}
    said = {
        option
        for code in re.findall(r"`([^`\n]+)`", text)
        if not code.startswith(
            (
                "pip",
                "python benchmarks",
                "python experiments",
                "python tests",
                "python -m tests",
                "git",
                "ruff",
                "XLA",
                "xla",
            )
        )
        and not re.match(r"\w+\.py ", code)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)
    }
    assert said <= known | others, f"{document.name} names {sorted(said - known - others)}"


SCRIPTS = {f.name: f for folder in ("benchmarks", "experiments") for f in sorted((ROOT / folder).glob("**/*.py"))
           if ".envs" not in f.parts}  # fmt: skip


def options_of(script: Path) -> set[str]:
    """The options of a script of benchmarks/ or experiments/: the fields of its classes and of those it imports from beside it."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    files = [script, *(f for name in imported if (f := script.with_name(f"{name}.py")).is_file())]
    fields = {
        line.target.id
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    for node in tree.body:  # tyro also takes a function's arguments
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            fields |= {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)}
    return {f"--{name.strip('_').replace('_', '-')}" for name in fields} | {"--help"}


def script_calls(document: Path) -> set[tuple[str, str]]:
    """(script, option) of every call of a script in code, in blocks and in lines."""
    text = document.read_text(encoding="utf-8")
    lines = [line for body in blocks(document, "bash") + blocks(document, "") for line in body.splitlines()]
    lines += [line for line in text.splitlines() if line.startswith("    python ")]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return {
        (name, option)
        for line in lines
        for name, rest in re.findall(r"([\w.]+\.py)((?: [^#]*)?)", line)
        if name in SCRIPTS
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)
        if not re.search(r"fedsim (run|check|profile|sweep)", line)
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_options_of_scripts_exist(document: Path) -> None:
    """What stands behind the name of a benchmark or an experiment is an option of it."""
    unknown = {(name, option) for name, option in script_calls(document) if option not in options_of(SCRIPTS[name])}
    assert not unknown, f"{document.name} names {sorted(unknown)}"


def test_there_are_calls_of_scripts() -> None:
    """The test above can fail."""
    calls = set().union(*(script_calls(document) for document in DOCUMENTS))
    assert ("run.py", "--workloads") in calls and ("tables.py", "--small") in calls
    assert "--no-such" not in options_of(SCRIPTS["tables.py"]) and "--small" in options_of(SCRIPTS["tables.py"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_exist(document: Path) -> None:
    """Relative links and pictures lead to files of the repository."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    missing = [t for t in targets if t and not (document.parent / t).exists()]
    assert not missing, f"{document.name} links to {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_python_is_python(document: Path) -> None:
    """Python blocks compile, and use only public names of fedsim."""
    for body in blocks(document, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "fedsim":
                    assert node.attr in fedsim.__all__, f"{document.name}: fedsim.{node.attr}"
                elif node.value.id == "run":
                    assert hasattr(Run, node.attr), f"{document.name}: run.{node.attr}"


@pytest.mark.parametrize("document", [*DOCUMENTS, *EXPERIMENTS], ids=lambda d: d.name)
def test_nothing_is_left_to_fill_in(document: Path) -> None:
    assert not re.findall(r"<<[A-Z_]+>>", document.read_text(encoding="utf-8"))


PACKAGE = ROOT / "src" / "fedsim"
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table of docs/design.md below a heading, without its head."""
    table = DESIGN.split(f"## {heading}", 1)[1].split("\n|", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_design_names_every_room_and_module() -> None:
    """The table of docs/design.md has every room, and behind it every module of the room but those that are named apart."""
    said = {cells[1].strip("`"): cells[2] for cells in rows("The rooms")}
    files = {p.name for p in PACKAGE.glob("*.py")} - {"__init__.py"}
    folders = {f"{p.parent.name}/" for p in PACKAGE.glob("*/__init__.py")}
    assert set(said) == files | folders
    for room in folders - {"data/", "backbones/", "algorithms/"}:  # whose files the folder's own table lists
        modules = {p.stem for p in (PACKAGE / room).glob("*.py")} - {"__init__"}
        named = set(re.findall(r"`(\w+)`", said[room]))
        assert modules <= named, f"{room} has {sorted(modules - named)} unnamed"


def test_the_house_stays_small() -> None:
    """Few files at the top, folders two deep, no module too long, each room with a word of welcome."""
    assert len(list(PACKAGE.glob("*.py"))) <= 12
    modules = [p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")]
    assert max(len(p.parts) for p in modules) <= 3
    long = {str(p): n for p in modules if (n := (PACKAGE / p).read_text(encoding="utf-8").count("\n")) > 400}
    assert not long, f"more than 400 lines: {long}"
    for init in PACKAGE.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        assert len(re.findall(r"[.!?](?=\s|$)", text)) >= 2, f"{init.parent.name}: two or three sentences"
    functions = {
        f"{p}:{node.name}": node.end_lineno - node.lineno + 1
        for p in modules
        for node in ast.walk(ast.parse((PACKAGE / p).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    }
    assert max(functions.values()) <= 100, {name: n for name, n in functions.items() if n > 100}


# A line that no checker looks at, and what stands behind it.
MUTED = re.compile(r"# (?:noqa|(?:type|pyrefly): ignore)\b:? ?(?:\[[\w,-]+\]|[A-Z]+\d+)?(?P<reason>.*)")


def test_a_muted_line_says_why() -> None:
    """A reason behind `noqa` and `type: ignore`, in all that is ours."""
    silent = []
    for folder in ("src", "tests", "experiments", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            where = file.relative_to(ROOT)
            if ".envs" in where.parts or file == Path(__file__):
                continue
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                muted = MUTED.search(line)
                if muted and len(re.findall(r"\w+", muted["reason"])) < 2:
                    silent.append(f"{where}:{number}")
    assert silent == []


def test_six_files_have_the_lines_that_design_says() -> None:
    said = {cells[0].strip("`"): int(cells[1]) for cells in rows("The code in six files")}
    assert len(said) == 6
    assert said == {name: (PACKAGE / name).read_text(encoding="utf-8").count("\n") for name in said}


def test_each_way_through_the_code_is_five_sentences() -> None:
    ways = re.findall(r"^\*\*A (batch|message|number)\*\* \(.*?\)\. (.*?)\n\n", DESIGN, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in ways] == ["batch", "message", "number"]
    for name, text in ways:
        assert len(re.findall(r"\.(?=\s|$)", text)) == 5, name


def sentences(document: Path) -> Iterator[str]:
    """The prose of a page, sentence by sentence: no code, no tables, no headings."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", document.read_text(encoding="utf-8")), flags=re.DOTALL)
    kept = [line for line in text.splitlines() if not line.startswith(("|", "#", "!"))]
    for paragraph in re.split(r"\n\s*\n|\n- ", "\n".join(kept)):
        plain = re.sub(r"\]\([^)]*\)|[*`\[\]]", "", paragraph).replace("\n", " ")
        yield from (part for part in re.split(r"(?<=[.!?])\s+", plain) if part.strip())


def test_the_readme_is_read_to_its_end() -> None:
    """At most 150 lines, and sentences of at most 25 words."""
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 150
    long = [s for s in sentences(ROOT / "README.md") if len(s.split()) > 25]
    assert not long, long


def test_ci_runs_the_readme_commands() -> None:
    """`.ci/run` installs and tests by the README's own two commands, in this order."""
    readme, script = (
        (ROOT / "README.md").read_text(encoding="utf-8"),
        (ROOT / ".ci" / "run").read_text(encoding="utf-8"),
    )
    assert PIP_TEST in readme
    install, run = PIP_TEST.split(" && ")
    lines = [line.replace("pip install -q", "pip install") for line in script.splitlines()]
    assert install in lines
    assert any(line.split()[:1] == [run] for line in lines)


def test_every_dependency_is_locked() -> None:
    """ci-constraints.txt pins each dependency of pyproject.toml, within its bound."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "ci-constraints.txt").read_text(encoding="utf-8").splitlines()
    locked = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    locked = {canonicalize_name(name): version for name, version in locked.items()}
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for e in ("notebook", "test", "lint") for r in extras[e])]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name != "fedsim-jax":
            assert name in locked, f"{name} is not in ci-constraints.txt"
            assert requirement.specifier.contains(locked[name]), f"{name}=={locked[name]} is outside {requirement}"


def test_main_job_is_the_default() -> None:
    """`fedsim run` and `fedsim run experiments/main_job.py` are the same run."""
    options = parse(RunOptions, [str(ROOT / "experiments" / "main_job.py")], "fedsim run")
    assert options.config() == main_job()


def test_own_texts_of_the_first_hour_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that makes a toy .csv, and the columns that the command names."""
    monkeypatch.chdir(tmp_path)
    body = next(b for b in blocks(ROOT / "docs" / "first_hour.md", "python") if "tickets.csv" in b and "open(" in b)
    exec(compile(body, "first_hour.md", "exec"), {})
    words = next(w for where, w in COMMANDS if where.name == "first_hour.md" and "tickets.csv" in w)
    source = data.read(parse(RunOptions, words[1:], "fedsim run").config())
    assert len(source.y) == 600
    assert source.classes == ("billing", "hardware")


@pytest.mark.slow
def test_own_model_of_its_page_runs(tmp_path: Path, blobs: Callable[..., Path], environment: dict[str, str]) -> None:
    """The model and the commands of docs/own_model.md as written; the model in at most 15 lines."""
    model, _ = blocks(ROOT / "docs" / "own_model.md", "python")
    assert sum(bool(line.strip()) for line in model.splitlines()) <= 15
    (tmp_path / "my_model.py").write_text(model)
    blobs(tmp_path).rename(tmp_path / "my_data.npz")
    written = [words for where, words in COMMANDS if where.name == "own_model.md" and "my_model.py:make" in words]
    assert [words[0] for words in written] == ["cost", "run"]
    for words in written:
        more = "--rounds 3 --clients 8 --clients-per-round 4 --min-size 2 --no-head-baseline --quiet"
        argv = [sys.executable, "-m", "fedsim", *words, *(more.split() if words[0] == "run" else [])]
        done = subprocess.run(
            argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert words[0] == "run" or f"{3 * 17 + 2 * (6 + 32 + 32 + 16):,}" in done.stdout  # head and LoRA


def test_own_algorithm_is_short() -> None:
    """In under 40 lines, without the module's docstring and blank lines."""
    file = ROOT / "experiments" / "own_algorithm.py"
    body = file.read_text(encoding="utf-8").split('"""', 2)[2]
    assert sum(bool(line.strip()) for line in body.splitlines()) < 40


@pytest.mark.slow
def test_own_algorithm_is_server_momentum(
    tmp_path: Path, blobs: Callable[..., Path], environment: dict[str, str]
) -> None:
    """Run by the first hour's form of the command line, it equals FedAvg with `sgd(momentum=0.5)` on the server."""
    small = f"--dataset {blobs(tmp_path)} --backbone mlp --peft full --clients 8 --clients-per-round 4 --rounds 3 --head-rounds 0"
    small += " --optimizer sgd --lr 0.1 --min-size 2 --no-head-baseline --quiet"
    own = ["--algorithm", f"{ROOT / 'experiments' / 'own_algorithm.py'}:fed_mine(beta=0.5)"]
    for name, more in {"own": own, "built-in": ["--server-optimizer", "sgd(momentum=0.5)"]}.items():
        argv = [sys.executable, "-m", "fedsim", "run", *small.split(), *more, "--out", str(tmp_path / name)]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
    a, b = (fedsim.load(tmp_path / name) for name in ("own", "built-in"))
    assert a.parameters.keys() == b.parameters.keys()
    for leaf in a.parameters:
        np.testing.assert_allclose(a.parameters[leaf], b.parameters[leaf], rtol=1e-5, atol=1e-6, err_msg=leaf)
    assert a.rounds[-1]["total_bytes_up"] == b.rounds[-1]["total_bytes_up"] > 0


def test_cheap_commands_run(environment: dict[str, str]) -> None:
    """Commands of the README that need neither data nor time, each in a process of its own."""
    for argv in (["--help"], ["list", "peft"], ["data", "list"], ["run", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "fedsim", *argv],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, f"fedsim {' '.join(argv)}: {done.stderr}"
        assert done.stdout.strip()
