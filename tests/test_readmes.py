"""READMEs: links lead somewhere, examples name flags that there are, and those of the digits' pipeline run."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_guided import ClassifierGuidedPipeline

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "tests" / "fixtures" / "digits_pipeline"
ROOMS = ("training", "pipelines", *(f"hf_guided/{room}" for room in ("conversion", "evaluation", "comparison", "hub")))
READMES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / room / "README.md" for room in (*ROOMS, "tests/benchmarks")),
]
NAMES = [str(path.relative_to(ROOT)) for path in READMES]


def blocks(readme: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)


def anchors(readme: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", readme.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES, ids=NAMES)
def test_every_block_of_code_ends(readme):
    fences = re.findall(r"^```.*$", readme.read_text(), re.MULTILINE)
    assert all(fence != "```" for fence in fences[::2])
    assert all(fence == "```" for fence in fences[1::2])
    assert len(fences) % 2 == 0


@pytest.mark.parametrize("readme", READMES, ids=NAMES)
def test_every_relative_link_leads_somewhere(readme):
    text = readme.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (readme.parent / path).resolve() if path else readme
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(linked), target


def test_every_picture_is_shown_and_every_readme_is_found():
    text = "".join(path.read_text() for path in READMES)
    assert {path for path in (ROOT / ".github" / "assets").iterdir() if path.name not in text} == set()
    found = {
        path
        for folder in ("hf_guided", "pipelines", "training", "tests")
        for path in ROOT.glob(f"{folder}/**/README.md")
    }
    assert {path.resolve() for path in found} == set(READMES[2:])
    front = READMES[0].read_text()
    assert all(f"]({name})" in front for name in NAMES[1:])


def test_the_two_commands_set_up_from_nothing():
    setting_up = (
        r"python3 -m venv \.venv && \.venv/bin/pip install -c constraints\.txt -e \"\.\[{}\]\" && \.venv/bin/{}\n"
    )
    train, check = blocks(ROOT / "README.md", "bash")[:2]
    assert re.fullmatch(setting_up.format("train", r"accelerate launch training/train\.py"), train)
    assert re.fullmatch(setting_up.format("test", "python -m pytest"), check)  # which .ci/run finds by its line


def test_the_first_page_fits_a_screen_or_two():
    assert len(READMES[0].read_text().splitlines()) <= 160
    assert len(READMES[1].read_text().splitlines()) <= 60


def test_the_first_pages_table_is_the_mean_of_the_measured_one():
    measured = READMES[-1].read_text().partition("## Kinds of guidance")[0]
    front = READMES[0].read_text()
    rows = [line for line in measured.splitlines() if line.startswith(("| held-out", "| scale"))]
    assert len(rows) == 7
    for row in rows:
        assert re.sub(r" \([^)]*\)", "", row) in front


def commands() -> list[tuple[str, str, frozenset[str]]]:
    """README, command or script, and the flags of each example."""
    found = []
    for readme in READMES:
        for block in blocks(readme, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                flags = frozenset(word for word in words if word.startswith("--"))
                for i, word in enumerate(words):
                    if Path(word).name == "hf-guided" or word == "hf_guided.cli":
                        flags = frozenset(word for word in words[i:] if word.startswith("--"))
                        found.append((str(readme.relative_to(ROOT)), words[i + 1], flags))
                    elif word.startswith("training/") or word.startswith("tests/benchmarks/"):
                        flags = frozenset(word for word in words[i:] if word.startswith("--"))
                        found.append((str(readme.relative_to(ROOT)), word, flags))
    return found


EXAMPLES = commands()


@pytest.mark.parametrize("command", sorted({command for _, command, _ in EXAMPLES if "/" not in command}))
def test_examples_of_commands_name_flags_that_there_are(command):
    call = [sys.executable, "-m", "hf_guided.cli", command, "--help"]
    known = subprocess.run(call, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for readme, name, flags in EXAMPLES:
        if name == command:
            assert flags <= set(re.findall(r"--\w+", known)), readme


@pytest.mark.parametrize("script", sorted({command for _, command, _ in EXAMPLES if command.startswith("training/")}))
def test_examples_of_scripts_name_flags_that_there_are(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"hf_guided.training.{Path(script).stem}").main()
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    for readme, name, flags in EXAMPLES:
        if name == script:
            assert flags <= known, readme


def test_examples_of_benchmarks_name_flags_that_there_are():
    for readme, name, flags in EXAMPLES:
        if name.startswith("tests/"):
            folder = (ROOT / name).parent
            source = "".join(path.read_text() for path in (ROOT / name, folder / "speed.py"))
            assert all(f'"{flag}"' in source for flag in flags), readme


def test_examples_in_python_run(monkeypatch):
    """Of the digits' pipeline, with what a reader has by then."""
    load = ClassifierGuidedPipeline.from_pretrained
    monkeypatch.setattr(ClassifierGuidedPipeline, "from_pretrained", lambda name: load(PIPELINE))
    made = 0
    for readme in (ROOT / "README.md", ROOT / "pipelines" / "README.md"):
        scope = {"small": torch.zeros(2, 1, 4, 4)}  # of the inverse problem
        for block in blocks(readme, "python"):
            code = compile(block, readme, "exec")
            if not re.search("adm-|user/", block):
                exec(code, scope)
                made += 1
    assert made == 4


@pytest.mark.parametrize("readme", READMES, ids=NAMES)
def test_every_example_in_python_is_python(readme):
    for block in blocks(readme, "python"):
        compile(block, readme, "exec")
