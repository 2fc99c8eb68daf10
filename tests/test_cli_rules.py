"""`prift rules`: what there is to choose from."""

import json

from prift.weigher import RULES
from tests import cli_fixtures as cli


def test_every_rule_is_listed_with_what_it_reads():
    lines = cli.succeeded(cli.prift("rules")).splitlines()
    rows = {line.split()[0]: line for line in lines[1 : 1 + len(RULES)]}
    assert set(rows) == set(RULES)
    for name, rule in RULES.items():
        assert all(statistic in rows[name] for statistic in rule.needs) and rule.scope in rows[name]


def test_json():
    found = {one["rule"]: one for one in json.loads(cli.succeeded(cli.prift("rules", "--json")))}
    assert set(found) == set(RULES)
    assert found["mass"]["options"] == {"threshold": 0.5, "ties": "paper"}
    assert found["eaft"]["statistics"] == "extended" and found["prob"]["statistics"] == "core"
    assert found["prob"]["method"] == ["dft", "prift-prob"]
    assert found["rho-1"]["scope"] == "batch" and found["rho-1"]["reads"] == "logprob / logprob"


def test_one_rule_with_its_formula():
    said = cli.succeeded(cli.prift("rules", "focal"))
    assert said.startswith("focal: w = (1 - q(y))^gamma") and "gamma=2.0" in said
    cli.refused(cli.prift("rules", "nope"), "unknown rule 'nope'. Rules: uniform, prob")
