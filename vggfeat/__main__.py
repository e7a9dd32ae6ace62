"""`vggfeat`, and `python -m vggfeat`."""

from __future__ import annotations

from vggfeat.start import begin


def main() -> None:
    """The `vggfeat` command."""
    begin()
    from vggfeat.cli import main

    main()


if __name__ == "__main__":
    main()
