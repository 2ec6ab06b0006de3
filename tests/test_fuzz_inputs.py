"""The fuzzer of wrong settings and damaged files, in its small form."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import fuzz_inputs


@pytest.mark.parametrize("seed", [11])
def test_wrong_input_is_accepted_or_refused_in_lines(seed: int) -> None:
    surfaces = ("settings", "yaml", "settings", "yaml", "json", "settings", "yaml", "npz")
    tallies = fuzz_inputs.run_inputs(64, seed, surfaces, commands=("show",))
    # How long an answer takes depends on what else the machine does.
    faults = [fault for tally in tallies.values() for fault in tally.faults if fault.what != "slow"]
    assert faults == []
    counts = {surface: sum(tally.counts.values()) for surface, tally in tallies.items()}
    assert counts == {"settings": 24, "yaml": 24, "json": 8, "npz": 8}


@pytest.mark.parametrize(
    ("code", "errors", "what"),
    [
        (0, "", "accepted"),
        (2, "raysweep: error: a = 1: must be\n", "refused"),
        (2, "", "silent"),
        (3, "raysweep: error: a\nsecond line\n", "silent"),
        (2, f"raysweep: error: {'x' * 5000}\n", "silent"),
    ],
)
def test_what_counts_as_a_fault(code: int, errors: str, what: str) -> None:
    assert fuzz_inputs.classify_exit(code, errors)[0] == what


def test_an_exception_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str]) -> int:
        raise KeyError("path_type")

    monkeypatch.setattr(fuzz_inputs, "run_command_line", fail)
    what, detail, _ = fuzz_inputs.answer(["show", "at"])
    assert what == "traceback" and "KeyError" in detail
