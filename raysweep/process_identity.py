"""Identity of a process: its machine, its number, and when it started.

The number alone does not identify a process, because numbers are used again, above all after a
reboot.
"""

import os
import socket
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import psutil

from raysweep.spec import JsonDict

# Boot times are whole seconds, so start times that were computed at different moments differ.
_START_TOLERANCE = 2.0


@dataclass(frozen=True)
class ProcessIdentity:
    """A process of some machine.

    Attributes:
        host: Host name of the machine.
        pid: Process number.
        boot: Identifies the boot of the machine, and on Linux the namespace of the process number;
            "" if the system has no such value.
        started: When the process started: on Linux in seconds since the boot, elsewhere in Unix
            seconds. It does not change if the machine's clock is set.
    """

    host: str
    pid: int
    boot: str
    started: float

    @classmethod
    def of_this_process(cls) -> Self:
        """Return the identity of the calling process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _read_boot(), _read_start(pid))

    @classmethod
    def from_json_dict(cls, values: JsonDict) -> Self:
        """Read an identity from what `to_json_dict` returned.

        Args:
            values: The values; other keys are ignored.

        Raises:
            ValueError: A value is missing or has another type.
        """
        try:
            host, pid, boot = values["host"], values["pid"], values["boot"]
            return cls(str(host), int(pid), str(boot), float(values["started"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"no identity of a process: {values}") from error

    def to_json_dict(self) -> JsonDict:
        """Return the identity as JSON values."""
        return {
            "host": self.host,
            "pid": self.pid,
            "boot": self.boot,
            "started": round(self.started, 2),
        }

    def is_gone(self) -> bool:
        """Return whether the process has certainly ended.

        Returns:
            True if this is a process of the machine and boot of the caller, and no process has its
            number, or one that started at another time. False if it runs, and for processes of
            other machines, boots or namespaces of process numbers, which the caller does not see.
        """
        if self.host != socket.gethostname() or self.boot != _read_boot():
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            return abs(_read_start(self.pid) - self.started) > _START_TOLERANCE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@cache
def _read_boot() -> str:
    """Return what identifies the boot and the namespace of process numbers; "" if unknown."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot_id} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _read_start(pid: int) -> float:
    """Return when a process started, as in `ProcessIdentity.started`."""
    if sys.platform != "linux":
        return psutil.Process(pid).create_time()  # type: ignore[no-any-return]
    # psutil adds the boot time, which changes when the machine's clock is set. Some versions keep
    # the boot time of an earlier call, and `boot_time` renews it.
    boot_time = psutil.boot_time()
    return psutil.Process(pid).create_time() - boot_time  # type: ignore[no-any-return]
