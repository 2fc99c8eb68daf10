"""What names the files of weights: the same in every process, another for other weights."""

import subprocess
import sys
from pathlib import Path

import pytest

from prift.methods import weigher

SAY = """
from prift.methods import weigher
print(weigher("mass*focal", "prior", {"threshold": "0.3", "gamma": "1"}, mix=0.5).code)
"""


def test_two_processes_say_the_same():
    said = {
        subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(said) == 1 and "0x" not in said.pop()


def test_whatever_changes_the_weights_changes_it():
    codes = [
        weigher("mass", "prior", {}),
        weigher("mass", "prior", {"threshold": "0.3"}),
        weigher("mass", "online", {}),
        weigher("prob", "prior", {}),
        weigher("mass*prob", "prior", {}),
        weigher("mass", "prior", {}, mix=0.1),
        weigher("mass", "prior", {}, least=0.1),
        weigher("mass", "prior", {}, most=0.1),
    ]
    assert len({chosen.code for chosen in codes}) == len(codes)
    edited = weigher("mass", "prior", {})

    def mass(stats, *, threshold=0.5, ties="paper"):
        return stats.logprob

    rule = type(edited.factors[0].rule)("mass", edited.factors[0].rule.needs, mass)
    assert type(edited).of(rule, "prior").code != edited.code


def test_a_helper_beside_a_rule_is_part_of_it(tmp_path):
    """The rule function is the same, and what it calls is not."""
    said = set()
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "calm.py").write_text(
            "from prift.weigher import rule\n\n\n"
            f"def power(x):\n    return x**{number}\n\n\n"
            '@rule("calm", needs=("logprob",))\n'
            "def calm(stats):\n    return power(stats.logprob.exp())\n"
        )
        say = SAY.replace("mass*focal", "calm:calm").replace(
            '{"threshold": "0.3", "gamma": "1"}', "{}"
        )
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.append({str(folder)!r})\n{say}"],
            capture_output=True,
            text=True,
        )
        said.add(done.stdout)
    assert len(said) == 2 and all("power(stats" in one for one in said)


@pytest.mark.parametrize("name", ["rules.py", "comparing.py", "roles.py"])
def test_prifts_own_rules_are_all_their_files(name, monkeypatch):
    """Whatever a rule calls, an edited file makes another weight of it."""
    before, read = weigher("prob", "prior", {}).code, Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda p: read(p) + (b"# edited" if p.name == name else b"")
    )
    assert weigher("prob", "prior", {}).code != before
