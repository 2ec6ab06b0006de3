"""What a pipeline that runs anew leaves on the disk: the last nights, and prefixes of this one only."""

import datetime
from pathlib import Path

from raysweep import storage
from raysweep.training.prefix import PREFIXES


def forget(sweeps: Path, tonight: str, keep: int | None) -> None:
    """Delete the prefixes of the other nights, which none starts from, and all sweeps before the last `keep` nights.

    sweeps: a folder of each night's sweeps, or of each revision's; tonight: one of them; keep: nights, this one
    included, or None for all.
    """
    others = [name for name in storage.children(sweeps) if name != tonight]
    nights = sorted([tonight, *filter(_is_night, others)])
    gone = set(nights[:-keep] if keep else ())
    for name in others:
        storage.discard(sweeps / name if name in gone else sweeps / name / PREFIXES)


def today() -> str:
    return datetime.date.today().isoformat()


def _is_night(name: str) -> bool:
    try:
        return datetime.date.fromisoformat(name).isoformat() == name
    except ValueError:
        return False
