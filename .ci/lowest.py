"""The lowest release of each dependency that pyproject.toml allows, as constraints for pip."""

from __future__ import annotations

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for line in [*project["dependencies"], *chain(*project["optional-dependencies"].values())]:
    if line.startswith(project["name"] + "["):  # another of the project's own lists
        continue
    name, lowest = re.fullmatch(r"([\w.-]+)>=([\w.]+)", line).groups()
    sys.stdout.write(f"{name}=={lowest}\n")
