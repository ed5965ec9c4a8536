"""The package in the shape in which a type checker finds it: as a script, checks all of it.

    python tests/support/typed_layout.py

`build/types/minillm` holds links to the files of the rooms, laid out as `setup.py` installs them. A checker does not
run the import hook of an editable installation; it reads folders.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "types"
CHECK = (sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable)


def packages() -> dict[str, str]:
    """Import names with the folders that become them."""
    for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no PACKAGES")


def lay_out(folder: Path) -> None:
    """Makes the package `minillm` anew in a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, room in packages().items():
        package = folder.joinpath(*name.split("."))
        package.mkdir(parents=True)
        # File by file: the checker does not follow links to folders.
        for file in [*(ROOT / room).glob("*.py"), *(ROOT / room).glob("py.typed")]:
            (package / file.name).symlink_to(file)


if __name__ == "__main__":
    lay_out(FOLDER)
    sys.exit(subprocess.run([*CHECK, "--project", str(ROOT)], check=False).returncode)
