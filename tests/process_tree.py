"""Find the processes that a test has started. They may end while they are looked at."""

import psutil


def find_descendants(text: str) -> list[psutil.Process]:
    """Return the descendants of this process whose name or command line contains the text."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if text in process.name() or text in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:  # also: psutil.ZombieProcess
            continue
    return found
