"""What a pipeline that runs anew leaves on the disk: the last nights, and prefixes of this one
only.
"""

import datetime
from pathlib import Path

from raysweep import storage
from raysweep.training.prefix_cache import PREFIX_CACHE_FOLDER


def delete_old_nights(sweeps_folder: Path, current_night: str, keep_nights: int | None) -> None:
    """Delete the prefixes of the other nights, which none starts from, and all sweeps before the
    last `keep` nights.

    sweeps: a folder of each night's sweeps, or of each revision's; tonight: one of them; keep:
    nights, this one included, or None for all.
    """
    others = [name for name in storage.list_subfolders(sweeps_folder) if name != current_night]
    nights = sorted([current_night, *filter(_is_iso_date, others)])
    gone = set(nights[:-keep_nights] if keep_nights else ())
    for name in others:
        storage.delete_everywhere(
            sweeps_folder / name if name in gone else sweeps_folder / name / PREFIX_CACHE_FOLDER
        )


def get_today_date() -> str:
    return datetime.date.today().isoformat()


def _is_iso_date(name: str) -> bool:
    try:
        return datetime.date.fromisoformat(name).isoformat() == name
    except ValueError:
        return False
