"""Files that name code of theirs or of others, which must never be imported (point 10)."""

import contextlib
import hashlib
import io
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from attack_table import attack, refusal_of
from foreign_references import make_context, write_checkpoint
from hostile_texts import in_folder, make_sweep

from raysweep import load
from raysweep.cli import main
from raysweep.code_files import forget_code_afterwards, open_code_file
from raysweep.data import DataSpec, load_data
from raysweep.errors import RaysweepError
from raysweep.models import ModelSpec
from raysweep.pipeline.artifact import Artifact
from raysweep.sweep.ledger import Ledger
from raysweep.training.model_loading import load_factory_target

NAME = "planted_by_a_stranger"
# Of the places of a file, as many as a test has time for.
MAX_PLACES = 30
REFERENCES = (f"{NAME}:make", NAME, f"{NAME}.make", f"!!python/name:{NAME}.make", "os:system")


@contextlib.contextmanager
def planted_module(folder: Path) -> Iterator[Path]:
    """Put a module into the current folder and the path; yield a file that exists if it has run."""
    marker = folder / "it-ran"
    (folder / f"{NAME}.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\ndef make(*a): return 0\n"
    )
    sys.path.insert(0, str(folder))
    try:
        with in_folder(folder):
            yield marker
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(NAME, None)


def places(content: object) -> Iterator[Callable[[object], None]]:
    """Yield setters of all values of JSON data."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items):
        yield lambda new, key=key: content.__setitem__(key, new)
        if isinstance(value, dict | list) and value:
            yield from places(value)


def plant_everywhere(file: Path, read: Callable[[], object], marker: Path) -> int:
    """Put a reference to code into each place of a JSON file, and read it; return their number."""
    original = file.read_text()
    n_places = len(list(places(json.loads(original))))
    n_tried = min(n_places, MAX_PLACES)
    for number in random.Random(0).sample(range(n_places), n_tried):
        content = json.loads(original)
        list(places(content))[number](REFERENCES[number % len(REFERENCES)])
        file.write_text(json.dumps(content))
        with contextlib.suppress(RaysweepError):
            read()
        assert not marker.exists() and NAME not in sys.modules, content
    file.write_text(original)
    return n_tried


@attack(10, "a checkpoint that names module:factory in each of its places")
def code_in_a_checkpoint(folder: Path) -> str:
    path = write_checkpoint(folder, {})
    meta = json.loads((path / "meta.json").read_text())
    meta["data_fingerprint"] = load_data(DataSpec(**meta["config"]["data"])).fingerprint
    (path / "meta.json").write_text(json.dumps(meta))
    with planted_module(folder) as marker:
        n_places = plant_everywhere(path / "meta.json", lambda: load(path), marker)
    return f"{n_places} places: shown or ignored, never imported"


@attack(10, "a sweep.json and a trial.json that name module:factory in each of their places")
def code_in_a_sweep(folder: Path) -> str:
    make_sweep(folder)
    sweep = folder / "runs/s"

    def read() -> None:
        ledger = Ledger.open(sweep)
        ledger.rank_trials()
        ledger.space.trial_config({})

    with planted_module(folder) as marker:
        n_places = sum(
            plant_everywhere(file, read, marker)
            for file in (sweep / "sweep.json", sweep / "trials/0000/trial.json")
        )
    return f"{n_places} places: shown or ignored, never imported"


@attack(10, "an artifact that names module:factory in each of its places")
def code_in_an_artifact(folder: Path) -> str:
    context = make_context(folder)
    stage = {"kind": "train", "rows": {}}
    candidate = {"label": "a", "method": "at", "checkpoint": "runs/x", "epoch": 1, "epochs": 1}
    candidate["metrics"] = {"robust_worst": 0.5}
    content = {"kind": "train", "key": "k", "stage": stage, "inputs": [], "candidates": [candidate]}
    file = context.out / "artifact.json"
    file.write_text(json.dumps(content))

    def read() -> None:
        artifact = Artifact.read_if_finished(context.out)
        assert artifact is not None
        for one in artifact.candidates:
            load(str(context.resolve_reference(one.checkpoint)))

    with planted_module(folder) as marker:
        n_places = plant_everywhere(file, read, marker)
    return f"{n_places} places: shown or ignored, never imported"


@attack(10, "a folder or a sweep that is called like module:factory")
def folder_called_like_code(folder: Path) -> str:
    with planted_module(folder) as marker:
        (folder / "runs").mkdir()
        for name in ("runs/x:make", f"./{NAME}:make", f"runs/{NAME}:make"):
            (folder / name).mkdir(parents=True)
            with contextlib.redirect_stderr(open(os.devnull, "w")):  # noqa: PTH123
                main(["show", name])
                main(["eval", name])
        assert not marker.exists()
    return "taken for folders"


@attack(10, "libraries' names in the folder of one's own module:factory")
def files_called_like_libraries(folder: Path) -> str:
    """The module is the user's own word; other files of the folder are not."""
    marker = folder / "it-ran"
    for library in ("mlflow_of_a_stranger", "sndhdr_of_a_stranger"):
        (folder / f"{library}.py").write_text(f"open({str(marker)!r}, 'w')")
    (folder / "my_own_models.py").write_text("import torch\ndef make(): return torch.nn.Flatten()")
    path = list(sys.path)
    try:
        with in_folder(folder):
            load_factory_target("my_own_models:make")
        assert sys.path[: len(path)] == path, "the folder comes after all libraries"
    finally:
        sys.path[:] = path
        sys.modules.pop("my_own_models", None)
    return "the folder is searched last"


@attack(10, "a checkpoint, a sweep and an artifact that name a network of a file beside them")
def network_of_a_strangers_file(folder: Path) -> str:
    """The file is there under every name that could be tried, with the recorded digest."""
    path = write_checkpoint(folder, {})
    make_sweep(folder)
    with planted_module(folder) as marker:
        source = (folder / f"{NAME}.py").read_bytes()
        digest = hashlib.sha256(source).hexdigest()
        for name in ("network.source", "code.py", f"{digest}.py", f"raysweep_code_{digest}.py"):
            (path / name).write_bytes(source)
            (folder / name).write_bytes(source)
        for file, key in ((path / "meta.json", "config"), (folder / "runs/s/sweep.json", "space")):
            content = json.loads(file.read_text())
            if key == "config":
                content["config"]["model"].update(name="make", code=digest)
                data = DataSpec(**content["config"]["data"])
                content["data_fingerprint"] = load_data(data).fingerprint
            else:
                content["space"].setdefault("base", {}).update(
                    {"model.name": "make", "model.code": digest}
                )
            file.write_text(json.dumps(content))
        lines = [refusal_of(lambda: load(path))]
        ledger = Ledger.open(folder / "runs/s")
        network = ledger.space.trial_config({}).model
        lines.append(refusal_of(lambda: network.build_model(1, 10, 0)))
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            for command in (["eval", str(path)], ["tune", "--resume", "s"], ["show", "s"]):
                main(command)
        assert not marker.exists() and not any(name.startswith(NAME) for name in sys.modules)
        assert "Traceback" not in printed.getvalue()
    assert all("runs only if you name it: --code FILE" in line for line in lines)
    return lines[0]


@attack(10, "the file of --code changes after its digest was taken, or is not the recorded one")
def changed_code(folder: Path) -> str:
    """What was hashed is what runs; another content is refused before anything of it runs."""
    with planted_module(folder) as marker:
        own = folder / "own.py"
        own.write_text("import torch\ndef make(c, k): return torch.nn.Flatten()")
        with forget_code_afterwards():
            network = ModelSpec(name="make", code=open_code_file(own).sha256)
            own.write_bytes((folder / f"{NAME}.py").read_bytes())
            network.build_model(1, 10, 0)
        with forget_code_afterwards():
            open_code_file(own)
            line = refusal_of(lambda: network.build_model(1, 10, 0))
        assert not marker.exists()
    return line
