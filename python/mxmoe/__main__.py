"""``python -m mxmoe`` is the ``mxmoe`` command."""

from __future__ import annotations

from mxmoe.cli import main

if __name__ == "__main__":
    main()
