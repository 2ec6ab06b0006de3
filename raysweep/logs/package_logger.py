"""The logger `raysweep`, of which those of all modules are children."""

import logging
from typing import ClassVar

from raysweep.logs.handlers import TerminalHandler

_package_logger = logging.getLogger("raysweep")


class _Attached:
    """What this package has added to the logger.

    Attributes:
        handlers: Handlers of the terminal and of folders.
        root_forwarder: Passes records on to the handlers of the program that uses raysweep.
    """

    handlers: ClassVar[list[logging.Handler]] = []
    root_forwarder: "ClassVar[_RootForwarder | None]" = None


class _RootForwarder(logging.Handler):
    """Passes records on to the root logger's handlers, unless a command of raysweep runs."""

    def __init__(self, logger_level: int, effective_level: int) -> None:
        """Remember the levels of the package's logger, to restore and to apply them.

        Args:
            logger_level: The logger's own level.
            effective_level: Level from which records are passed on.
        """
        super().__init__(effective_level)
        self.logger_level = logger_level

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the record on."""
        if not any(isinstance(handler, TerminalHandler) for handler in _Attached.handlers):
            for handler in logging.getLogger().handlers:
                if record.levelno >= handler.level:
                    handler.handle(record)


def attach_handlers(*handlers: logging.Handler) -> None:
    """Let handlers receive all records of raysweep.

    Args:
        handlers: Handlers that are not attached yet.
    """
    for handler in handlers:
        _Attached.handlers.append(handler)
        _package_logger.addHandler(handler)
    _update_level()


def detach_handlers(*handlers: logging.Handler) -> None:
    """Undo `attach_handlers`.

    Args:
        handlers: Handlers that are attached.
    """
    for handler in handlers:
        _Attached.handlers.remove(handler)
        _package_logger.removeHandler(handler)
    _update_level()


def detach_all_handlers() -> None:
    """In a fork, detach the handlers that the parent process has attached. They stay open there."""
    detach_handlers(*_Attached.handlers)


def _update_level() -> None:
    """Let all records pass while a handler is attached.

    In this time the handlers of the program that uses raysweep get the records that they would have
    got without: other libraries configure the root logger, and would print every record again.
    """
    root_forwarder = _Attached.root_forwarder
    if _Attached.handlers and root_forwarder is None:
        root_forwarder = _RootForwarder(_package_logger.level, _package_logger.getEffectiveLevel())
        _package_logger.addHandler(root_forwarder)
        _package_logger.setLevel(logging.DEBUG)
        _package_logger.propagate = False
        _Attached.root_forwarder = root_forwarder
    elif not _Attached.handlers and root_forwarder is not None:
        _package_logger.removeHandler(root_forwarder)
        _package_logger.setLevel(root_forwarder.logger_level)
        _package_logger.propagate = True
        _Attached.root_forwarder = None
