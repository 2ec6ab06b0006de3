"""How failures of trials are reported, how lost processes are described, and how SIGTERM is
handled.
"""

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny

from raysweep.spec import SpecError
from raysweep.stores import open_path
from raysweep.sweep.process_death_causes import describe_process_loss
from raysweep.training.failure_reports import (
    clear_failure_report,
    failure_report,
    load_failure_report,
    save_failure_report,
)
from raysweep.training.trainer import TrainingFailed

OUT_OF_MEMORY = (
    "out of memory: lower batch_size (now 16) or raise --cpus-per-trial, so that fewer run at once"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TrainingFailed("the loss became nan in epoch 3"), "the loss became nan in epoch 3"),
        (SpecError(["epochs = 0: at least 1", "seed = x: a number"]),
         "epochs = 0: at least 1\nseed = x: a number"),
        (MemoryError(), OUT_OF_MEMORY),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"
            ),
            OUT_OF_MEMORY,
        ),
    ],
)  # fmt: skip
def test_a_failure_that_settings_or_memory_explain_is_no_bug(
    error: Exception, reason: str, tmp_path: Path
) -> None:
    surroundings = {"infrastructure": "yes"} if reason == OUT_OF_MEMORY else {}
    expected = {"failed": reason, **surroundings}
    assert failure_report(error, tiny("at", batch_size=16), tmp_path) == expected
    assert not list(tmp_path.iterdir()), "no traceback is kept"


@pytest.mark.parametrize(("trial", "more"), [(True, " or raise --gpus-per-trial"), (False, "")])
def test_a_gpu_that_ran_out_of_memory_is_named(
    trial: bool, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    found = failure_report(
        torch.OutOfMemoryError("CUDA out of memory"), tiny("at"), tmp_path, trial
    )
    assert found == {
        "failed": f"out of memory on NVIDIA H200: lower batch_size (now 32){more}",
        "infrastructure": "yes",
    }


def test_anything_else_is_a_bug_with_its_traceback(tmp_path: Path) -> None:
    try:
        raise RuntimeError("shapes differ\n  in the second line") from KeyError("cause")
    except RuntimeError as error:
        found = failure_report(error, tiny("at"), tmp_path)
    assert found["failed"] == "RuntimeError: shapes differ"
    assert found["bug"] == (tmp_path / "error.txt").read_text()
    lines = found["bug"].splitlines()
    assert lines[0] == "KeyError: 'cause'" and lines[-2:] == [
        "RuntimeError: shapes differ",
        "  in the second line",
    ]


def test_a_report_is_kept_for_the_next_workers_until_it_is_forgotten(tmp_path: Path) -> None:
    assert load_failure_report(open_path(tmp_path)) == {}
    report = {"failed": "KeyError: 'no'", "bug": "Traceback"}
    save_failure_report(open_path(tmp_path), report)
    assert (
        load_failure_report(open_path(tmp_path))
        == report
        == json.loads((tmp_path / "failed.json").read_text())
    )
    save_failure_report(open_path(tmp_path), {"failed": "again"})
    assert load_failure_report(open_path(tmp_path)) == {"failed": "again"}
    for _ in range(2):
        clear_failure_report(open_path(tmp_path))
        assert load_failure_report(open_path(tmp_path)) == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("account", "reason"),
    [
        ("", "its process or its node died"),
        ("The actor died because its node has died.", "its process or its node died"),
        ("Preempted by another: the node running low on memory.",
         "its process was killed because the node ran out"),
        ("The actor is dead because its node was preempted.", "its node was preempted"),
        # What Ray wrote for a trial whose function raised, and for one that could not be
        # unpickled; the frames are shortened.
        ("\x1b[36mray::ImplicitFunc.train()\x1b[39m (pid=9, ip=192.0.2.1, repr=raises)\n"
         '  File "/ray/tune/trainable/trainable.py", line 329, in train\n'
         "    raise skipped from exception_cause(skipped)\n"
         '  File "/home/me/own.py", line 17, in raises\n'
         '    def raises(config): raise ValueError("own: ray::error")\n'
         "                        ^^^^^^^^^^^^^^^^^^^^^^^^^\n"
         "ValueError: own error\nsecond line", "ValueError: own error"),
        ("The actor died because of an error raised in its creation task, "
         "\x1b[36mray::ImplicitFunc.__init__()\x1b[39m (pid=9, ip=192.0.2.1)\n"
         '  File "/ray/_private/function_manager.py", line 5, in load\n'
         "    return pickle.loads(data)\n"
         "ModuleNotFoundError: No module named 'own'", "ModuleNotFoundError: No module"),
    ],
)  # fmt: skip
def test_descriptions_of_lost_processes(account: str, reason: str) -> None:
    assert describe_process_loss(account).startswith(reason)


class Trainable:
    """Stands for the class that Tune makes from a training function."""

    def setup(self, config: dict[str, Any]) -> None:
        self.config = config


def ended_at_once(code: int) -> None:
    raise SystemExit(f"at once: {code}")


def test_sigterm_waits_while_a_trial_is_working(monkeypatch: pytest.MonkeyPatch) -> None:
    from raysweep.sweep import preemption

    monkeypatch.setattr(
        preemption, "_SigtermState", SimpleNamespace(requested=False, deferred=False)
    )
    monkeypatch.setattr("os._exit", ended_at_once)
    before = signal.getsignal(signal.SIGTERM)
    try:
        made: Any = type("Made", (preemption.PreemptibleMixin, Trainable), {})()
        made.setup({"number": 3})
        assert made.config == {"number": 3}, "`setup` of Tune's class is called as well"
        assert not preemption.termination_requested()
        with preemption.defer_sigterm():
            signal.raise_signal(signal.SIGTERM)
            assert preemption.termination_requested(), "the working trial can see the request"
        with pytest.raises(SystemExit) as end:
            signal.raise_signal(signal.SIGTERM)
        assert end.value.code == 143
        with pytest.raises(SystemExit, match="at once: 143"):
            preemption.exit_preempted()
        with pytest.raises(KeyError), preemption.defer_sigterm():
            raise KeyError
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
