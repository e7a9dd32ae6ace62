"""The lowest release of each dependency that pyproject.toml allows, as constraints for pip."""

from __future__ import annotations

import sys
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for line in chain(project["dependencies"], *project["optional-dependencies"].values()):
    if not line.startswith(project["name"] + "["):  # which is another of these lists
        name, lowest = line.split(">=")
        sys.stdout.write(f"{name}=={lowest}\n")
