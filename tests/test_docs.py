"""What README.md, docs/ and the other pages show works; the web site of docs/ is built without a warning."""

import re
import runpy
import shlex
import subprocess
import sys
import warnings
from argparse import ArgumentParser

import pytest
from scripts import ROOT, run
from torch.distributed.run import get_args_parser as torchrun_parser

from se3_transformer.runtime import settings

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in (".", "docs", "benchmarks", "pretrained", "results")
    for path in sorted(ROOT.glob(f"{folder}/*.md"))
}
HANDS_ON = {  # scripts that hand flags on to another
    "train_qm9_targets.py": "train_qm9.py",
    "results/nbody_learning_curve.py": "train_nbody.py",
}
OTHER_PROGRAMS = {"pip", "tensorboard", "nox", "ruff", "mypy", "coverage", "mkdocs"}
PARSE_SETTINGS, PARSE_KNOWN_ARGS = settings.parse_settings, ArgumentParser.parse_known_args
HIDDEN = r"<!-- for the test\n(.*?)-->"  # Python that a page leaves out


def python_of(text):
    """All Python of a page, in its order."""
    return [shown or hidden for shown, hidden in re.findall(rf"```python\n(.*?)```|{HIDDEN}", text, re.DOTALL)]


def commands_of(text):
    """Commands in the bash blocks of a page, and in its sentences where they begin with python or torchrun."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += re.findall(r"`((?:python|torchrun) [^`…]+)`", prose)
    split = [shlex.split(line, comments=True) for line in lines]
    return [command for line in split for command in divide(line)]


def divide(words):
    """The commands between `&&`."""
    commands = [[]]
    for word in words:
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if python_of(text)])
def test_python_runs(page, tmp_path, monkeypatch):
    """One block after the other, as a reader would type them in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    namespace = {}
    for number, block in enumerate(python_of(PAGES[page]), start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)


def test_readme_shows_what_is_printed(capsys):
    exec(python_of(PAGES["README.md"])[0], {})
    assert capsys.readouterr().out == "torch.Size([50, 1, 1]) torch.Size([50, 1, 3])\n"


class Parsed(BaseException):
    """The flags of a script have been read and checked."""


def check_flags(script, flags):
    """Run a script up to where it has read its flags; a flag that it does not have ends it with status 2."""

    def parse_settings(*args, **kwargs):
        PARSE_SETTINGS(*args, **kwargs)
        raise Parsed

    def parse_known_args(self, *args):
        _, others = PARSE_KNOWN_ARGS(self, *args)
        check_flags(HANDS_ON[script], others)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *flags])
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # a script may set its own
        patch.setattr(settings, "parse_settings", parse_settings)
        patch.setattr(ArgumentParser, "parse_known_args", parse_known_args if script in HANDS_ON else PARSE_KNOWN_ARGS)
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands_of(text)])
def test_commands_are_understood(page, capsys):
    for command in commands_of(PAGES[page]):
        program, *rest = command
        program = program.removeprefix(".venv/bin/")
        if program == "torchrun":
            arguments = torchrun_parser().parse_args(rest)
            program, rest = "python", [arguments.training_script, *arguments.training_script_args]
        if program in OTHER_PROGRAMS or rest[:2] in (["-m", "venv"], ["-m", "pytest"]):
            continue
        assert program == "python", f"{page}: what is {shlex.join(command)}?"
        if rest[0] == "-m":
            rest = [rest[1].replace(".", "/") + ".py", *rest[2:]]
        script, *flags = rest
        assert (ROOT / script).is_file(), f"{page}: {shlex.join(command)}"
        if not flags:
            continue
        try:
            check_flags(script, flags)
        except SystemExit:
            pytest.fail(f"{page}: {shlex.join(command)}: {capsys.readouterr().err.splitlines()[-1]}")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("script", ["results/nbody_table.py", "results/qm9_table.py"])
def test_tables_are_those_of_the_result_files(script, tmp_path):
    printed = run(script, cwd=tmp_path).stdout.splitlines()
    missing = [line for line in printed if line and line not in PAGES["docs/results.md"].splitlines()]
    assert not missing, f"docs/results.md lacks what {script} prints"


def test_site(tmp_path):
    """Every page, link and anchor, and the reference; mathematics is converted, nothing is loaded from elsewhere."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    assert pages.keys() >= {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert pages["mathematics.html"].count("<math") > 50
    assert "edge_feats" in pages["api.html"]
    for name, text in pages.items():
        assert "arithmatex" not in text, f"{name}: mathematics that was not converted"
        assert not re.findall(r"""<(?:script|img|link)[^>]+(?:src|href)=["']https?:""", text), name


def test_figures(tmp_path):
    """The script draws what the pages show, small enough for a repository."""
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    figures["main"](tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"architecture.svg", "kernel.svg"}
    for path in [*(ROOT / "docs").glob("*.svg"), *(ROOT / "docs").glob("*.png")]:
        assert path.stat().st_size < 200_000, path
    assert names <= {path.name for path in (ROOT / "docs").glob("*.svg")}
