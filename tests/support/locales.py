"""Environments in which text isn't UTF-8 unless a program says so."""

import shutil
import subprocess
from pathlib import Path

C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""ASCII: there is always one."""


def latin_1(folder: Path) -> dict[str, str]:
    """ISO-8859-1, made in `folder`; C where that can't be made (no localedef, or no sources for it)."""
    name = "en_US.ISO-8859-1"
    build = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / name)]
    if shutil.which("localedef") is None or subprocess.run(build, check=False, capture_output=True).returncode:
        return C
    return {"LOCPATH": str(folder), "LC_ALL": name, "PYTHONUTF8": "0"}
