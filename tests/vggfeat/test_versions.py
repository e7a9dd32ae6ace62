"""Versions are what the modules say of themselves, whether they are loaded or not."""

from __future__ import annotations

import json
import subprocess
import sys

import h5py
import numpy as np
import PIL
import sklearn
import timm
import torch
import torchvision

import vggfeat
from vggfeat.versions import versions

from ..conftest import HANG


def test_versions_are_those_of_the_modules_and_load_none_of_them() -> None:
    modules = (torch, torchvision, timm, np, h5py, sklearn, PIL)
    expected = {module.__name__: str(module.__version__) for module in modules}
    expected |= {"vggfeat": vggfeat.__version__, "python": sys.version.split()[0]}
    assert versions() == expected
    script = """
import json, sys
from vggfeat.versions import versions
told = versions()
assert not {"torchvision", "timm", "sklearn"} & sys.modules.keys()
print(json.dumps(told))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == expected
