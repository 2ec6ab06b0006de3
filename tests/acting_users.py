"""Run functions as other users, with real user ids."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")


def act_as(user: int, action: Callable[[], object]) -> object:
    """Return the result of an action of a user, or the error that it raised."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_act, args=(user, action, sender))
    process.start()
    result = receiver.recv()
    process.join()
    return result


def _act(user: int, action: Callable[[], object], sender: Connection) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    os.umask(0o022)
    try:
        sender.send(action())
    except Exception as error:
        sender.send(error)
