"""What the pages say is so. The house keeps its size and its layers."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import jupytext
import pytest
from conftest import HERE, NO_GPU, run

PAGES = {"README.md": 130, "tutorial.md": 560, "paper/README.md": 90, "experiments/README.md": 250,
         "weights/README.md": 60}  # the most lines
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
ROOMS = {".": 1738, "support": 871, "paper": 660, "experiments": 1648, "tests": 3197}  # the most lines of code
TEXT = {name: (HERE / name).read_text(encoding="utf-8") for name in PAGES if (HERE / name).exists()}
FILES = [file.relative_to(HERE) for room in ROOMS for file in (HERE / room).glob("*.py")]
FILES = [file for file in FILES if len(file.parts) > 1 or f"`{file}`" in TEXT["README.md"]]  # no reader's own
CODE = {file: (HERE / file).read_text(encoding="utf-8") for file in FILES}
RUN_ALL = """
import contextlib, io, json, subprocess, sys
sys.path.insert(0, "")
names, printed = {"__name__": "tutorial"}, []
for k, code in enumerate(json.load(sys.stdin)):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if code.startswith("%%bash"):
            print(subprocess.run(["bash", "-ec", code[6:]], check=True, stdout=subprocess.PIPE, text=True).stdout)
        else:
            exec(compile(code, f"code cell {k} of tutorial.md", "exec"), names)
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


def agrees(shown, printed):
    """Word for word. A number after "about" is the result of a training, and may differ by 0.05 elsewhere."""
    rough = r"(?<=about )\d\.\d+"
    pairs = zip(*(map(float, re.findall(rough, text)) for text in (shown, printed)))
    same = re.sub(rough, "#", shown) == re.sub(rough, "#", printed)
    return same and all(abs(a - b) <= 0.05 for a, b in pairs)


def test_tutorial_runs_as_a_notebook_and_prints_what_it_shows(tmp_path):
    """jupytext makes the notebook, as README says. What a cell prints stands in the block of text below it."""
    for file in CODE:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(HERE / file, tmp_path / file)
    cells, steps, shown = jupytext.reads(TEXT["tutorial.md"], "md").cells, [], []
    for cell, below in zip(cells, [*cells[1:], cells[0]]):
        if cell.cell_type == "code":
            steps.append(cell.source)
            shown.append((re.match(r"```(?:text|console)\n(.*?)^```$", below.source, re.M | re.S) or [""] * 2)[1])
    assert len(steps) == len(re.findall("^```(?:python|bash)$", TEXT["tutorial.md"], re.M)) > 15
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    how = dict(input=json.dumps(steps), capture_output=True, text=True, cwd=tmp_path, env=NO_GPU | {"PATH": path})
    done = subprocess.run([sys.executable, "-c", RUN_ALL], **how)
    assert done.returncode == 0, done.stderr
    for code, want, got in zip(steps, shown, json.loads(done.stdout), strict=True):
        if code.startswith("%%bash"):  # a training's log: its words count, its numbers do not
            lines = [re.sub(r"[\d.]+", "#", text).split() for text in got.splitlines()]
            assert all(re.sub(r"[\d.]+", "#", text).split() in lines for text in want.splitlines()), got
        else:
            assert agrees(want, got), f"tutorial.md: {code}\nprints:\n{got}"
    assert agrees("IoU about 0.75\n", "IoU about 0.79\n") and not agrees("IoU about 0.75\n", "IoU about 0.65\n")


def test_tutorial_quotes_the_code_and_the_code_cites_its_equations():
    quotes = [block[2] for block in BLOCK.finditer(TEXT["tutorial.md"]) if block[1] == "py"]
    assert len(quotes) >= 3 and [quote for quote in quotes if not any(quote in text for text in CODE.values())] == []
    tags = re.findall(r"\\tag\{(\d+)\}", TEXT["tutorial.md"])
    assert list(map(int, tags)) == list(range(1, len(tags) + 1))  # in the order in which they appear
    cited = re.findall(r"\b[Ee]qs?\. ((?:\(\d+\)(?:, |-| and )?)+)", "\n".join(CODE.values()))
    assert len(cited) > 10 and set(re.findall(r"\d+", " ".join(cited))) <= set(tags)


def test_readme_shows_code_that_runs(monkeypatch):
    monkeypatch.chdir(HERE)
    exec(re.search("^```python\n(.*?)^```$", TEXT["README.md"], re.M | re.S)[1], names := {})
    assert [tuple(names[name].shape) for name in ("ids", "s")] == [(1, 128, 170), (1, 2, 128, 170)]
    assert names["loss"].requires_grad and not names["s"].requires_grad


def test_the_map_leads_to_lines_and_tests_that_exist():
    lines = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", TEXT["tutorial.md"])
    for name, file, line in lines:
        assert re.match(rf" *(def|class) {name}\b", CODE[Path(file)].splitlines()[int(line) - 1]), f"{file}: {name}"
    tests = set(re.findall(r"`(test_\w+)`", TEXT["tutorial.md"]))
    assert len(lines) > 10 and len(tests) > 3
    assert {test for test in tests if f"def {test}(" not in "\n".join(CODE.values())} == set()


def anchors(text):
    """Those that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return [re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "]", head).lower()).replace(" ", "-") for head in heads]


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_to_what_exists(page):
    text = re.sub(r"```.*?```", "", TEXT[page], flags=re.S)
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"`[^`]*`", "", text)):
        file, _, anchor = link.partition("#")
        if not file.startswith(("https:", "http:")):
            target = (HERE / page).parent.joinpath(file).resolve() if file else HERE / page
            assert target.exists(), link
            if anchor and not re.fullmatch(r"L\d+", anchor):
                assert anchor in anchors(target.read_text(encoding="utf-8")), link
    for path in re.findall(r"`((?:results|figures|support|paper|experiments|tests)/[\w./]*)`", text):
        assert (HERE / path).exists() or (HERE / page).parent.joinpath(path).exists(), path


def test_pages_show_every_picture():
    shown = re.findall(r"!\[([^\]]*)\]\((.+?)\)", "\n".join(TEXT.values()))
    assert {Path(name).name for _, name in shown} == {path.name for path in (HERE / "figures").iterdir()}
    assert [name for alt, name in shown if len(alt) < 30] == []


def test_pages_and_scripts_name_only_commands_and_flags_that_exist():
    helps = {".".join(file.with_suffix("").parts): text for file, text in CODE.items() if len(file.parts) > 1}
    scripts = {"train.py", "predict.py", "data.py", "experiments.bench"}
    helps |= {script: run(script, "--help").stdout for script in scripts}
    texts = [*TEXT.values(), *(text for file, text in CODE.items() if file.parts[0] != "tests")]
    command = r"(?:python -m|python|torchrun\b.*) (\w+\.py|\w+\.[a-z]\w+)\b([^`&#\n]*)"
    commands = re.findall(command, "\n".join(texts))
    assert len(commands) > 30 and scripts <= {script for script, _ in commands} <= helps.keys()
    for script, flags in commands:
        assert [flag for flag in re.findall(r"--[a-z]+", flags) if flag not in helps[script]] == [], script
    flags = {flag for text in TEXT.values() for flag in re.findall(r"`(--[a-z]+)", text)}
    assert [flag for flag in flags if not any(flag in help for help in helps.values())] == []


def test_ci_runs_the_second_command_of_readme(tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 7\n")  # with this the command fails where it begins
    (tmp_path / "python3").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run([HERE / ".ci/run"], capture_output=True, text=True, env=os.environ | {"PATH": path})
    _, second, *_ = re.findall(r"^```bash\n(.*?)^```$", TEXT["README.md"], re.M | re.S)
    assert done.returncode == 7 and done.stdout == second and "python -m pytest" in second


def test_the_house_keeps_its_size():
    lines, sizes = {file: text.splitlines() for file, text in CODE.items()}, dict.fromkeys(ROOMS, 0)
    tests = {file for file in CODE if file.parts[0] == "tests" or file.name.startswith("test_")}
    for file in CODE:
        sizes["tests" if file in tests else str(file.parent)] += len(lines[file])
    assert {room: n for room, n in sizes.items() if n > ROOMS[room]} == {}
    assert {file: len(lines[file]) for file in CODE.keys() - tests if len(lines[file]) > 450} == {}
    assert [line for file in CODE for line in lines[file] if len(line) > 120] == []
    assert {page: n for page, text in TEXT.items() if (n := len(text.splitlines())) > PAGES[page]} == {}
    assert len(TEXT["README.md"].split()) <= 1300


def test_imports_point_down_and_make_no_circle():
    layers = "rurnet gates_triton | support | paper | data | evaluate | train predict | experiments | tests"
    rank = {name: i for i, layer in enumerate(layers.split("|")) for name in layer.split()}
    home = lambda file: "tests" if file.name.startswith("test_") else file.parts[0].removesuffix(".py")
    imports = {file: set() for file in CODE}
    for file, text in CODE.items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{name}" for name in names)]
            imports[file] |= CODE.keys() & {Path(name.replace(".", "/") + ".py") for name in names}
        for other in imports[file]:
            assert rank[home(other)] <= rank[home(file)], f"{file} imports {other}"
            assert home(other) != "train" or home(file) in ("experiments", "tests"), f"{file} imports {other}"
    assert sum(map(len, imports.values())) > 50
    TopologicalSorter(imports).prepare()  # CycleError names a circle
