"""What README.md and docs/ show works."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in (".", "docs", "benchmarks")
    for path in ROOT.glob(f"{folder}/*.md")
}


def in_pages(pattern):
    """(page, match) of everything that a pattern finds."""
    return [(page, match) for page, text in PAGES.items() for match in re.findall(pattern, text, re.MULTILINE)]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(block, capsys):
    exec(block, {})
    assert capsys.readouterr().out == "torch.Size([10, 1, 1]) torch.Size([10, 1, 3])\n"


@pytest.mark.parametrize("page, statement", in_pages(r"^((?:from|import) se3_transformer\b.*)$"))
def test_imports_work(page, statement):
    exec(statement, {})


@pytest.mark.parametrize("page, link", in_pages(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)"))
def test_links_lead_somewhere(page, link):
    assert (ROOT / page).parent.joinpath(link).exists()


@pytest.mark.parametrize("page, script", sorted(set(in_pages(r"python3? (?:-m )?((?:\w+\.py|\w+[./]\w+(?:\.py)?))\b"))))
def test_commands_name_scripts(page, script):
    path = script if script.endswith(".py") else script.replace(".", "/") + ".py"
    assert (ROOT / path).is_file()
