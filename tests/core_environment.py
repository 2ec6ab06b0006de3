"""Create an environment without Ray and MLflow whose packages are links to those of the current
one.

    python tests/core_environment.py FOLDER

creates it in FOLDER and prints the path of its interpreter. CI runs the quick tests there.
"""

import shutil
import sys
import sysconfig
import venv
from pathlib import Path

LEFT_OUT = ("ray", "mlflow")


def make_core_environment(folder: Path) -> Path:
    """Create the environment, deleting what `folder` held before, and return the path of its
    interpreter.
    """
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        name = package.name.lower().replace("-", "_")
        if not any(name == left_out or name.startswith(f"{left_out}_") for left_out in LEFT_OUT):
            (folder / "lib" / version / "site-packages" / package.name).symlink_to(package)
    return folder / "bin" / "python"


if __name__ == "__main__":
    print(make_core_environment(Path(sys.argv[1]).resolve()))
