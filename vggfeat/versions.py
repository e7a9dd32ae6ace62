"""The version of this package, and of all that takes part in a result, without importing what isn't
needed for anything else.
"""

from __future__ import annotations

import sys

__version__ = "0.1.0"

# Module -> the distribution that it comes in; 1.3 and 1.8 seconds are spared by torchvision and
# timm not being imported for this.
_PACKAGES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "numpy": "numpy",
    "h5py": "h5py",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
}


def versions() -> dict[str, str]:
    """Package -> version: this one, Python, and the libraries by the names of their modules."""
    import torch

    return {
        "vggfeat": __version__,
        "python": sys.version.split()[0],
        # as PyTorch has it: the distribution's metadata lack which build it is, as +cu130
        "torch": str(torch.__version__),
        **{module: _version(module, package) for module, package in _PACKAGES.items()},
    }


def _version(module: str, package: str) -> str:
    """The `__version__` of a module, loaded or not."""
    if module in sys.modules:
        return str(sys.modules[module].__version__)
    import re
    from importlib import metadata
    from importlib.util import find_spec
    from pathlib import Path

    # torchvision's file tells the build, too
    spec = find_spec(module)
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    try:
        told = re.search(r"""__version__ = ['"](.+)['"]""", (folder / "version.py").read_text())
    except OSError:
        told = None
    return told[1] if told else metadata.version(package)
