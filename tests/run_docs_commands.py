"""Run every command of README and docs in empty folders, and print the outputs as Markdown.

    python tests/run_docs_commands.py FOLDER [PAGE ...]

If a command needs more than a laptop, smaller settings are added to it, or it is skipped and the
output names the reason. It takes about an hour on two cores.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from test_docs import PAGES

# A page is followed in a folder of its own, or in that of the page it goes on from.
ORDER = {
    "README.md": "readme",
    "docs/sweeps.md": "readme",
    "docs/evaluate-your-own-model.md": "readme",
    "docs/tutorial.md": "tutorial",
    "docs/extend.md": "extend",
    "docs/storage.md": "storage",
    "docs/reproduce-a-table.md": "papers",
    "docs/scheduling.md": "cluster",
    "docs/cluster.md": "cluster",
}
SMALL = "--set data.name=arrays --set data.train_size=64 --set data.val_size=40 --set epochs=1"
CUT = {
    r"raysweep train lrat-table1 ": SMALL,
    r"raysweep run lrat-table1 .*seeds=": f"{SMALL} --set stages.autoattack.n=4",
    r"raysweep run lrat-table1 .*(--plan|--address)": SMALL,
    r"raysweep eval runs/lrat-row": "--n 4 --data-dir DIR",
    r"raysweep eval my_models:make": "--set data.name=arrays --data-dir DIR --n 20",
}
LEFT_OUT = {
    r"^python3 -m venv": "how this environment was made",
    r"^pip install|aws configure|EDITOR|^ray |^sudo|^--": "needs a cluster: see docs/cluster.md",
    r"^systemctl|^journalctl": "needs systemd",
    r"--address (auto|http)": "needs a cluster: see docs/cluster.md",
    r"run nightly --storage": "`run digits` with --storage instead, below",
}
MORE = {
    "README.md": [
        'eval "$(raysweep --print-completion bash)" && complete -p raysweep',
        "raysweep show g1/0003",
    ],
    "docs/tutorial.md": ["raysweep run digits", "raysweep tune --resume g1 --trials 12"],
    "docs/cluster.md": ["raysweep doctor"],
    "docs/storage.md": ["raysweep run digits --storage s3://lab/sweeps"],
}
# Servers, which would never end.
SECONDS = {r"^mlflow ui": 20}
LINES = 24


def main(folder: Path, pages: list[str]) -> None:
    here = os.environ | bucket() | {"COLUMNS": "120", "RAY_USAGE_STATS_ENABLED": "0"}
    data = folder / "images"
    images(data)
    failed = []
    for page, name in ORDER.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        files(PAGES[page], folder / name)
    for page, name in ORDER.items():
        if page not in (pages or ORDER):
            continue
        print(f"\n## {page}\n", flush=True)
        for command in [*commands(PAGES[page]), *MORE.get(page, [])]:
            if why := found(LEFT_OUT, command):
                print(f"`{command}`: left out, {why}.\n")
                continue
            added = found(CUT, command)
            if not said(f"{command} {added}".strip(), folder / name, here, data, folder):
                failed.append(command)
    print(f"\n{len(failed)} failed{': ' + '; '.join(failed) if failed else ''}")
    sys.exit(bool(failed))


def commands(page: str) -> Iterator[str]:
    for block in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if command := re.sub(r"\s+#.*", "", line).strip():
                yield command


def files(page: str, place: Path) -> None:
    """Blocks that begin with a file's name, as files; the model of one page gets its weights."""
    for text, name in re.findall(r"^```\w+\n(# ([\w.-]+\.(?:yaml|py)).*?)^```", page, re.M | re.S):
        (place / name).write_text(text)
    if (place / "my_models.py").exists():
        subprocess.run([sys.executable, "-c", "import torch, torchvision as t;"
                        "torch.save(t.models.resnet18(num_classes=10).state_dict(), 'weights.pt')"],
                       cwd=place, check=True)  # fmt: skip


def found(table: dict[str, str], command: str) -> str:
    return next((value for pattern, value in table.items() if re.search(pattern, command)), "")


def said(command: str, place: Path, env: dict[str, str], data: Path, folder: Path) -> bool:
    """Run it, print it and the end of what it said; whether all was well."""
    limit = next((s for pattern, s in SECONDS.items() if re.search(pattern, command)), None)
    began = time.monotonic()
    typed = re.sub(r"\bDIR\b", shlex.quote(str(data)), command)
    process = subprocess.Popen(["bash", "-c", typed], cwd=place, env=env, stdin=subprocess.DEVNULL,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)  # fmt: skip
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        out, _ = process.communicate()
    seconds, ok = time.monotonic() - began, process.returncode == 0 or limit is not None
    lines = [line.split("\r")[-1].rstrip() for line in out.replace(f"{folder}/", "~/").splitlines()]
    if len(lines) > LINES:
        lines = [
            *lines[: LINES // 3],
            f"... ({len(lines) - LINES} lines)",
            *lines[-2 * LINES // 3 :],
        ]
    end = "" if ok else f", exit code {process.returncode}"
    print(
        "```text", f"$ {command}", *lines, f"({seconds:.0f} s{end})", "```\n", sep="\n", flush=True
    )
    return ok


def images(folder: Path) -> None:
    """A data set of the user's own, in CIFAR-10's shape."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", 400), ("test", 100)):
        y = np.arange(count) % 10
        x = rng.integers(0, 100, (count, 3, 32, 32)) + 15 * y[:, None, None, None]
        np.savez(folder / f"{name}.npz", x=x.astype(np.uint8), y=y)


def bucket() -> dict[str, str]:
    """A server that speaks S3, with the bucket `lab`, and how to reach it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    where = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
             "AWS_DEFAULT_REGION": "us-east-1",
             "AWS_ENDPOINT_URL": f"http://{host}:{port}"}  # fmt: skip
    os.environ.update(where)
    boto3.client("s3").create_bucket(Bucket="lab")
    return where


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
