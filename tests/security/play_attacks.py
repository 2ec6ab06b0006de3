"""Play all attacks of `attack_table.py`, and print them as a table.

`python tests/security/play_attacks.py` needs the development installation only. The exit code is
the number of attacks that succeeded.
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import attack_modules
from attack_table import ATTACKS


def main() -> int:
    """Print the table."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    assert attack_modules.MODULES
    n_successful = 0
    print("| point | attack | at d5c5dbc | now |\n|---|---|---|---|")
    for attack in sorted(ATTACKS, key=lambda attack: attack.point):
        with tempfile.TemporaryDirectory() as folder:
            try:
                seen = f"held: {attack.play(Path(folder))}".replace(folder, "FOLDER")
            except Exception as error:
                seen = f"**fell**: {type(error).__name__}: {error}"
                n_successful += 1
        cells = (str(attack.point), attack.name, attack.before, seen)
        print(
            "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
        )
    return n_successful


if __name__ == "__main__":
    sys.exit(main())
