"""One summary line, as pytest's own, of several runs from their JUnit reports.

    python3 .ci/summary.py REPORT...

Exit code 1 where a report is absent, is no report or has no test that passed, and where something
failed.
"""

import sys
import xml.etree.ElementTree as xml

NAMES = {"failures": "failed", "errors": "error", "skipped": "skipped"}


def counts(path: str) -> dict[str, float]:
    """Of one report: tests of each outcome, and seconds."""
    found = dict.fromkeys(("failed", "passed", "skipped", "error", "seconds"), 0.0)
    for suite in xml.parse(path).getroot().iter("testsuite"):
        other = {name: int(suite.get(kind, 0)) for kind, name in NAMES.items()}
        other["passed"] = int(suite.get("tests", 0)) - sum(other.values())
        other["seconds"] = float(suite.get("time", 0))
        found = {name: found[name] + other[name] for name in found}
    return found


def main(paths: list[str]) -> int:
    total, code = dict.fromkeys(("failed", "passed", "skipped", "error", "seconds"), 0.0), 0
    for path in paths:
        try:
            found = counts(path)
        except (OSError, xml.ParseError) as error:
            print(f"a run left no report: {error}")
            found, code = {"error": 1}, 1
        if not found.get("passed"):
            print(f"no test passed in {path}")
            code = 1
        total = {name: total[name] + found.get(name, 0) for name in total}
    seconds = total.pop("seconds")
    said = [f"{int(n)} {name}" for name, n in total.items() if n or name == "passed"]
    print(f"{', '.join(said)} in {seconds:.2f}s")
    return 1 if code or total["failed"] or total["error"] or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
