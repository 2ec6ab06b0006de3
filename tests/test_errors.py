"""The hierarchy of errors: exit codes, and what survives pickle."""

import concurrent.futures
import pickle
import socket

import pytest
from forked_processes import FORKS

from raysweep import errors
from raysweep.errors import (
    DamagedFileError,
    InfrastructureError,
    RaysweepError,
    RegressionFound,
    SpecError,
    WorkFailed,
    WorkInterrupted,
    is_infrastructure_error,
    list_causes,
)
from raysweep.pipeline.stage import StageFailed
from raysweep.stores import StoreUnavailable
from raysweep.training.distributed import WorkerLost
from raysweep.training.mid_epoch_checkpoint import TrainingInterrupted
from raysweep.training.trainer import TrainingFailed

CODES = {
    SpecError: 2,
    InfrastructureError: 3,
    StoreUnavailable: 3,
    DamagedFileError: 4,
    RegressionFound: 5,
    WorkFailed: 1,
    StageFailed: 1,
    TrainingFailed: 1,
    WorkerLost: 1,
    WorkInterrupted: 130,
    TrainingInterrupted: 130,
}


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.__name__)
def test_each_class_has_its_documented_code(kind):
    assert int(kind.exit_code) == CODES[kind]
    assert issubclass(kind, RaysweepError)


def test_the_table_names_every_class_of_the_module():
    classes = {value for value in vars(errors).values() if isinstance(value, type)}
    found = {value for value in classes if issubclass(value, RaysweepError)}
    assert found - {RaysweepError} <= set(CODES)


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.__name__)
def test_pickle_keeps_class_problems_and_the_chain_of_causes(kind):
    try:
        try:
            try:
                {}["seed"]
            except KeyError as error:
                raise OSError(28, "No space left on device", "x.json") from error
        except OSError as error:
            raise DamagedFileError("inner") from error
    except DamagedFileError as error:
        outer = kind(["a: first", "b: second"])
        outer.__cause__ = error
    outer.hint = "kept"
    copy = pickle.loads(pickle.dumps(outer))
    assert type(copy) is kind
    assert copy.problems == ["a: first", "b: second"]
    assert str(copy) == "a: first\nb: second"
    assert copy.hint == "kept"
    inner, full_disk, key = list_causes(copy)
    assert type(inner) is DamagedFileError and inner.problems == ["inner"]
    assert type(full_disk) is OSError and full_disk.errno == 28 and full_disk.filename == "x.json"
    assert type(key) is KeyError and key.args == ("seed",)


class HoldsASocket(Exception):
    def __init__(self, connection: socket.socket) -> None:
        super().__init__("refused by 10.0.0.1")
        self.connection = connection


class NeedsTwo(Exception):
    """Its copy by pickle fails when it is loaded."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def test_a_cause_that_cannot_be_pickled_arrives_as_text():
    with socket.socket() as connection:
        error = InfrastructureError("no cluster")
        error.__cause__ = HoldsASocket(connection)
        error.__cause__.__cause__ = NeedsTwo("one", "two")
        copy = pickle.loads(pickle.dumps(error))
    texts = [str(cause) for cause in list_causes(copy)]
    assert texts == ["HoldsASocket: refused by 10.0.0.1", "NeedsTwo: one and two"]


def test_a_cycle_of_causes_ends():
    first, second = SpecError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert list_causes(first) == [second]
    assert [str(cause) for cause in list_causes(pickle.loads(pickle.dumps(first)))] == ["second"]


def test_a_prefix_stands_before_each_problem():
    error = DamagedFileError(["a", "b"]).with_prefix("node-1: ")
    assert type(error) is DamagedFileError
    assert error.problems == ["node-1: a", "node-1: b"]


def test_a_problem_that_nobody_can_read_keeps_its_start_and_its_end():
    value = "x" * 200_000
    (problem,) = SpecError(f"optim.lr = {value!r}: must be a number; see docs").problems
    assert len(problem) < 2100
    assert problem.startswith("optim.lr = 'xxx")
    assert problem.endswith("x': must be a number; see docs")
    # 11 characters before the value, its quotes, 31 after it; 2,000 are kept.
    assert f"... ({11 + 200_002 + 28 - 2000} characters) ..." in problem
    (whole,) = SpecError("a" * 2000).problems
    assert whole == "a" * 2000
    (traceback,) = TrainingFailed(value).problems
    assert traceback == value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "x"), True),
        (PermissionError(13, "Permission denied", "x"), True),
        (ConnectionError("no answer"), True),
        (TimeoutError(), True),
        (FileNotFoundError(2, "No such file or directory", "x"), False),
        (OSError("unclear"), False),
        (ValueError("x"), False),
    ],
)
def test_a_disk_rights_and_the_network_are_infrastructure(error, expected):
    assert is_infrastructure_error(error) is expected


def fail_in_a_worker() -> None:
    try:
        raise OSError(28, "No space left on device")
    except OSError as error:
        raise StoreUnavailable("s3://b/x: full") from error


def test_a_worker_process_raises_the_same_class_here():
    with (
        concurrent.futures.ProcessPoolExecutor(1, mp_context=FORKS) as pool,
        pytest.raises(StoreUnavailable) as caught,
    ):
        pool.submit(fail_in_a_worker).result()
    assert caught.value.problems == ["s3://b/x: full"]
    # The pool puts its own text in the place of the cause; the text has the whole chain.
    assert "No space left on device" in str(caught.value.__cause__)
