"""Disk space of pipelines that run each night or for each revision: deletion of old sweeps."""

import datetime
import logging

from raysweep.stores import StorePath
from raysweep.training.prefix_cache import PREFIX_CACHE_FOLDER

logger = logging.getLogger(__name__)


def prune_nightly_sweeps(
    sweeps_folder: StorePath, current_night: str, keep_nights: int | None
) -> None:
    """Delete the sweeps of old nights, and the cached prefixes of all other nights.

    No later night starts from cached prefixes.

    Args:
        sweeps_folder: Folder with one subfolder for each night (or revision).
        current_night: Name of the current subfolder.
        keep_nights: Number of nights to keep, the current one included; None to keep all.
    """
    others = [name for name in sweeps_folder.list_subfolders() if name != current_night]
    nights = sorted([current_night, *filter(_is_iso_date, others)])
    outdated = set(nights[:-keep_nights] if keep_nights else ())
    for name in others:
        folder = sweeps_folder / name
        if name in outdated:
            logger.info(
                "deleting the sweeps of %s: only %s nights are kept", name, keep_nights,
                extra={"event": "night_deleted", "night": name},
            )  # fmt: skip
        else:
            logger.debug("deleting the prefix cache of %s, if it has one", name)
            folder = folder / PREFIX_CACHE_FOLDER
        folder.delete_folder()


def list_nights(sweeps_folder: StorePath) -> list[str]:
    """Return the names of the subfolders of nights, oldest first; [] if there are none."""
    return sorted(filter(_is_iso_date, sweeps_folder.list_subfolders()))


def get_today_date() -> str:
    """Return the local date, such as `2026-03-01`."""
    return datetime.date.today().isoformat()


def _is_iso_date(name: str) -> bool:
    """Check whether a name is a date such as `2026-03-01`."""
    try:
        return datetime.date.fromisoformat(name).isoformat() == name
    except ValueError:
        return False
