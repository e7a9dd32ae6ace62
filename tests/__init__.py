"""No test depends on where it runs, nor does a process that one starts.

One thread, as nets here are small and a thread more changes the order of sums; none of the user's
settings. Here, as NumPy and PyTorch look only once. `conftest` hides a GPU.
"""

import os

os.environ |= {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "OMP_WAIT_POLICY": "passive",  # as commands set it
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # else it warns of processors
    "no_proxy": "*",
}
TERMINAL = (
    "COLUMNS",
    "TERMINAL_WIDTH",
    "FORCE_COLOR",
    "CLICOLOR_FORCE",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
)
for name in ("VGGFEAT_DATA", "PYTHONWARNINGS", "GITHUB_ACTIONS", "PY_COLORS", *TERMINAL):
    os.environ.pop(name, None)
