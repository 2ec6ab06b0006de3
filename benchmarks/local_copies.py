"""Measure how long it takes to place a small checkpoint among a thousand copies of a bucket's.

    git worktree add /tmp/before COMMIT
    python benchmarks/local_copies.py --code /tmp/before . --rounds 3

The checkouts of --code are measured in turns, each in a process of its own. Prints a table of
milliseconds: the median of 20 copies, and the first, which may count what is there.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

N_COPIES, N_PLACED = 1000, 20
FILES = ("meta.json", "weights.safetensors", "state.safetensors")


def write_files(folder: Path) -> Path:
    """Write the files of a small checkpoint."""
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(os.urandom(200))
    return folder


def measure_here(root: Path) -> list[float]:
    """Return the milliseconds of each placement with the raysweep that this process imports."""
    os.environ["RAYSWEEP_CACHE"] = str(root)
    from raysweep.stores import local_copies

    bucket = local_copies.bucket_copies_folder("s3", "bucket")
    for number in range(N_COPIES):
        write_files(bucket / f"s/trials/{number:04d}/epoch-0001")
    milliseconds = []
    for number in range(N_PLACED):
        partial = write_files(bucket / f"partial-{number}")
        began = time.perf_counter()
        local_copies.place_copy(partial, bucket / f"s/trials/{number:04d}/epoch-0002")
        milliseconds.append(1000 * (time.perf_counter() - began))
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--code", type=Path, nargs="+", default=[Path(__file__).parent.parent])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(*measure_here(args.measure))
        return
    from measure import describe_machine, format_table

    found: dict[Path, list[list[float]]] = {code: [] for code in args.code}
    for _ in range(args.rounds):
        for code in args.code:
            with tempfile.TemporaryDirectory(prefix="copies-") as folder:
                output = subprocess.run(
                    [sys.executable, __file__, "--measure", folder],
                    env={**os.environ, "PYTHONPATH": str(code.resolve())},
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                ).stdout
            found[code].append([float(word) for word in output.split()])
    print(describe_machine())
    print(f"{N_COPIES} copies; {args.rounds} rounds of {N_PLACED}")
    rows = [
        [
            str(code),
            f"{statistics.median(one for part in parts for one in part[1:]):.2f} ms",
            f"{statistics.median(part[0] for part in parts):.0f} ms",
        ]
        for code, parts in found.items()
    ]
    print(format_table(["code", "place a copy", "the first"], rows))


if __name__ == "__main__":
    main()
