"""The log of raysweep: warnings on the terminal, and all records in the folder of the work.

Modules call `logging.getLogger(__name__)`; only this package decides where their records go.

- On the terminal: warnings, or what `--verbose` and $RAYSWEEP_LOG_LEVEL ask for.
- In `log.jsonl` of a folder: all records of raysweep, and the warnings of other libraries, one JSON
  object a line. A sweep's drivers write the sweep's `log.jsonl`; each trial's process writes that
  of its trial, and `log.txt` for people. So no file has two writers, also where the machines share
  nothing but a bucket.

A log that cannot be written or uploaded never ends the work.
"""

from raysweep.logs.entries import JsonEntry, format_entry
from raysweep.logs.log_reading import read_log
from raysweep.logs.open_logs import close_logs, discard_log, log_to_folder, log_trial
from raysweep.logs.running_command import (
    LEVEL_VARIABLE,
    CommandLog,
    command_log,
    detach_command_log,
    format_command_line,
)

__all__ = [
    "LEVEL_VARIABLE",
    "CommandLog",
    "JsonEntry",
    "close_logs",
    "command_log",
    "detach_command_log",
    "discard_log",
    "format_command_line",
    "format_entry",
    "log_to_folder",
    "log_trial",
    "read_log",
]
