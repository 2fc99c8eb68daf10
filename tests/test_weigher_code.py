"""What names the files of weights: the same in every process, another for other weights."""

import subprocess
import sys

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
