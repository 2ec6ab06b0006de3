"""Shared by the benchmarks: timing in interleaved rounds, a line about the machine, and tables."""

import os
import platform
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from raysweep.attacks import fp32_precision

# Steps are measured on the GPU if there is one.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Ratio:
    """One line of the table that `python benchmarks` prints at its end.

    Attributes:
        what: what is measured.
        value: the measured ratio or amount.
        goal: the value to reach, or "".
        n: the number of rounds or runs behind the value.
    """

    what: str
    value: str
    goal: str
    n: str


def time_rounds(
    variants: Mapping[str, Callable[[], object]], n: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Time each variant in n interleaved rounds, after a warm-up round that does not count.

    With one thread these are processor seconds, which other load on the machine hardly changes.
    With more threads or a GPU these are wall seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(n + warm_up):
        for name, run in variants.items():
            spent = _seconds(run)
            if number or not warm_up:
                seconds[name].append(spent)
    return seconds


class ProcessorSeconds:
    """Context manager that counts the processor seconds of this process and its descendants.

    Processes may end in the block, so all are sampled four times a second, in a thread whose own
    time does not count.

    Attributes:
        total: Processor seconds of all processes, once the block has ended.
        by_name: The same by name of the program, the first word of the command line.
    """

    def __init__(self) -> None:
        self.by_name: Counter[str] = Counter()
        self._names: dict[tuple[int, float], str] = {}
        self._seconds: dict[tuple[int, float], tuple[float, float]] = {}
        self._has_ended = threading.Event()
        self._sampling_seconds = 0.0
        self._thread = threading.Thread(target=self._sample_until_end)
        self.total = 0.0

    def __enter__(self) -> "ProcessorSeconds":
        self._sample(is_first=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._has_ended.set()
        self._thread.join()
        self._sample()
        self.total = sum(now - before for before, now in self._seconds.values())
        self.total -= self._sampling_seconds
        for key, (before, now) in self._seconds.items():
            own = self._sampling_seconds if key[0] == os.getpid() else 0.0
            self.by_name[self._names.get(key, "?")] += now - before - own  # type: ignore[assignment]

    def _sample_until_end(self) -> None:
        while not self._has_ended.wait(0.25):
            self._sample()
        self._sampling_seconds = time.thread_time()

    def _sample(self, is_first: bool = False) -> None:
        own = psutil.Process()
        for process in [own, *own.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                key = (process.pid, process.create_time())
                times = process.cpu_times()
                now = times.user + times.system
                before, _ = self._seconds.get(key, (now if is_first else 0.0, 0.0))
                self._seconds[key] = (before, now)
                # Ray's workers change theirs when they start an actor; an ended process has none.
                if command := process.cmdline():
                    self._names[key] = Path(command[0]).name


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def describe_mean(values: Sequence[float], decimals: int = 3) -> str:
    """Return the mean and, of two or more values, its standard error."""
    mean = f"{statistics.fmean(values):.{decimals}f}"
    if len(values) < 2:
        return mean
    return f"{mean} +- {statistics.stdev(values) / len(values) ** 0.5:.{decimals}f}"


def measure_matrix_rate(
    dtype: torch.dtype, tries: int = 10, size: int = 8192 if DEVICE.type == "cuda" else 1024
) -> float:
    """Measure the highest FLOP/s of a product of square matrices; float32 means TF32 on NVIDIA
    GPUs.
    """
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    with fp32_precision("tf32"):
        best = min(_seconds(lambda: a @ b) for _ in range(tries))
    return float(2 * size**3 / best)


def read_commit() -> str:
    """Return the short hash of the commit that is checked out."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def describe_machine() -> str:
    """Return one line: date, GPU, processor, threads, load and versions."""
    load = f"load {os.getloadavg()[0]:.1f}"
    gpu = f"{torch.cuda.get_device_name()}, " if DEVICE.type == "cuda" else ""
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    where = f"{date.today()}, {gpu}{_processor()}, {threads}, {load}"
    return f"{where}, Python {platform.python_version()}, torch {torch.__version__}"


class Flops(TorchDispatchMode):
    """Context that counts the floating-point operations of matrix products and convolutions, in
    forward and backward passes.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _seconds(run: Callable[[], object]) -> float:
    on_gpu = DEVICE.type == "cuda"
    clock = time.process_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    started = clock()
    run()
    wait()
    return clock() - started


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    matrix = [
        name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {name}" in flags
    ]
    return f"{names[0] if names else platform.machine()} ({', '.join(matrix[:2])})"
