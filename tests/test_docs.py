"""The pages say what the program does: generated, complete, and with commands that parse."""

import inspect
import re
import shlex
from pathlib import Path

import click
import pytest
import torch

from prift.methods import METHODS
from prift.presets import PRESETS
from prift.stats import CORE, EXTENDED, TokenStats
from prift.weigher import RULES, Weigher
from prift_cli import main
from prift_cli.docs import commands, page

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md")) + sorted(ROOT.glob("*.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}


def headings(text: str) -> set[str]:
    return {h.strip("`# ") for h in re.findall(r"^#+ .*$", _without_blocks(text), re.MULTILINE)}


def _without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands_of(text: str) -> list[str]:
    """Lines of ```bash blocks that begin with prift, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("prift ")]


def parse(line: str) -> dict:
    """The options of a command line, which is not run."""
    words = shlex.split(line, comments=True)[1:]
    command, ctx = main, main.make_context("prift", list(words))
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(ctx, words)
        ctx = command.make_context(name, list(words), parent=ctx)
    return ctx.params


LINES = [(name, line) for name, text in PAGES.items() for line in commands_of(text)]


def test_cli_page_is_what_the_generator_prints():
    shown = (ROOT / "docs" / "cli.md").read_text()
    assert shown == page(), "run: python -m prift_cli.docs > docs/cli.md"


def test_cli_page_has_every_command_and_option():
    for command, ctx in commands():
        assert f"## `{ctx.command_path}`" in page()
        for option in command.params:
            if option.opts[0].startswith("--"):
                assert option.opts[0] in page()


def test_every_rule_and_method_has_a_section():
    assert set(RULES) | set(METHODS) <= headings(PAGES["docs/methods.md"])


def test_every_option_of_a_rule_is_in_its_section():
    text = PAGES["docs/methods.md"]
    for name, rule in RULES.items():
        section = re.split(r"^#+ ", text.partition(f"### `{name}`\n")[2], flags=re.MULTILINE)[0]
        for option, parameter in rule.options().items():
            row = re.search(rf"^\| `{option}` \| `?([^`|]*?)`? \|", section, re.MULTILINE)
            assert row, f"{name}: {option} has no row"
            assert type(parameter.default)(row[1]) == parameter.default, f"{name}: {option}"


def test_rule_table_is_the_one_in_the_code():
    text = PAGES["docs/methods.md"].partition("## Rules\n")[2].partition("### ")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| .+ \| ([\w, ]+) \| (\w+) \| .+ \|$", text, re.MULTILINE)
    expected = []
    for name, rule in RULES.items():
        needs = "extended" if set(rule.needs) & set(EXTENDED) else "core"
        needs = needs + (", twice" if rule.base else "") if rule.needs else "nothing"
        needs = "roles" if "role_N" in rule.given() else needs
        expected.append((name, needs, rule.scope))
    assert sorted(rows) == sorted(expected)


def test_every_rule_names_its_paper():
    """In its section, where it has one."""
    text = PAGES["docs/methods.md"]
    for name, rule in RULES.items():
        section = re.split(r"^#+ ", text.partition(f"### `{name}`\n")[2], flags=re.MULTILINE)[0]
        for paper in set(re.findall(r"\d{4}\.\d{5}", inspect.getdoc(rule.function))):
            assert paper in section or f"arxiv.org/abs/{paper})" in text, f"{name}: {paper}"


def test_the_rule_of_your_own_runs():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGES["docs/methods.md"], re.M | re.DOTALL)
    (block,) = [b for b in blocks if "@rule(" in b]
    names = {"__name__": "mine"}
    exec(block, names)
    stats = TokenStats(logprob=torch.tensor([-1.5, -2.5]), entropy=torch.tensor([1.0, 1.0]))
    assert Weigher.of(names["surprise"].rule, "prior")(stats).tolist() == [1, 0]


def test_method_table_is_the_one_in_the_code():
    rows = re.findall(
        r"^\| `([\w-]+)` \| `(\w+)` \| `?(\w+)`? \|", PAGES["docs/methods.md"], re.MULTILINE
    )
    found = {name: (rule, None if source == "none" else source) for name, rule, source in rows}
    assert found == METHODS


def test_preset_table_is_the_one_in_the_code():
    """Each preset with its program and the version at which that was read."""
    section = PAGES["docs/methods.md"].partition("## Presets\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    for name, one in PRESETS.items():
        (row,) = [row for row in rows if f"`{name}`" in row]
        assert one.program.partition(",")[0] in row
        # "the same": as the row above
        assert one.version in row or one.version in rows[rows.index(row) - 1]
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[3])}
    assert named - {"tokens", "kept"} == set(PRESETS)


def test_every_statistic_is_defined():
    text = PAGES["docs/statistics.md"]
    for name in CORE:
        assert re.search(rf"^\| `{name}` \| \S", text, re.MULTILINE), name


def test_every_metric_is_defined():
    from prift.metrics import SUMS, ratios

    metrics = ratios(dict.fromkeys(SUMS, 1.0))
    assert {"nll", "drift", "nll_kept", "drift_kept"} < set(metrics)
    for name in metrics:
        assert f"`{name}`" in PAGES["docs/methods.md"], name


def test_refused_training_arguments_are_named():
    from prift.arguments import _REFUSED

    for name in (*_REFUSED, "average_tokens_across_devices"):
        assert f"`{name}" in PAGES["docs/methods.md"], name


def test_there_are_commands_to_parse():
    assert {"README.md", "docs/quickstart.md", "docs/methods.md"} <= {name for name, _ in LINES}


@pytest.mark.parametrize(("name", "line"), LINES)
def test_commands_parse(name, line):
    from prift.arguments import training_arguments

    given = parse(line)  # which demands what is required
    if flags := given.get("training_flags"):
        training_arguments("out", {}, (*flags, "--use_cpu"), bool(given["eval_data"]))


def test_a_command_that_is_wrong_does_not_parse():
    with pytest.raises(click.UsageError):
        parse("prift train --model m --data d --output o --methods sft")
    with pytest.raises(click.UsageError):
        parse("prift precomput --model m --data d")


def test_links_resolve():
    seen = 0
    for name, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", _without_blocks(text)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            whole = ((ROOT / name).parent / path).resolve() if path else ROOT / name
            assert whole.exists(), f"{name} links to {target}"
            seen += 1
            if anchor:
                titles = headings(whole.read_text())
                slugs = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
                assert anchor in slugs, f"{name} links to {target}"
    assert seen > 5


def test_pages_that_the_readme_lists_are_all_there_is():
    for path in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in PAGES["README.md"], path.name
