"""What the documents say of the command line and of CI is what the code takes."""

import re
import shlex
from pathlib import Path

import pytest

from cka_hooks.command import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HELP = re.sub(r"\\\n\s*", "", "\n".join((cli.__doc__, *(words.__doc__ for words in cli.COMMANDS.values()))))
PAGES = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md")))
LINES = [line.strip() for line in (README + PAGES + HELP).splitlines()]
COMMANDS = [line for line in LINES if re.match("cka-hooks [a-z]", line)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_is_shown_can_be_parsed(command):
    words = shlex.split(re.split(r" {4,}| \| ", command)[0], comments=True)
    assert callable(cli.parser().parse_args(words[1:]).command)


@pytest.mark.parametrize(("name", "end"), [("demo", "cka-hooks demo --out demo"), ("test", "python -m pytest")])
def test_the_readme_has_the_commands_that_ci_reads_out_of_it(name, end):
    (command,) = re.findall(rf"^<!-- ci: {name} -->\n```sh\n(.*)\n```$", README, re.MULTILINE)
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert command.endswith(end)
    assert f"readme_command {name}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_pre_commit_runs_the_ruff_that_ci_runs():
    (pinned,) = re.findall(r'"ruff==([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"rev: v{pinned}" in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")


def test_links_to_files_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []
