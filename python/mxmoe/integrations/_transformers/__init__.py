"""What `mxmoe.integrations.transformers` is made of. Importing it checks which transformers there is."""

from __future__ import annotations

import importlib.metadata
import re

__all__ = ["NEWEST_TESTED", "OLDEST", "check_version"]

OLDEST = (5, 0, 0)
NEWEST_TESTED = (5, 23, 0)


def check_version(found: str | None = None) -> None:
    """Raise ImportError unless transformers is there in a version that this works with.

    Parameters
    ----------
    found : str, optional
        The version to judge; by default that of the installed package.

    Raises
    ------
    ImportError
        transformers is missing, older than `OLDEST` or of another major version.
    """
    oldest, tested = (".".join(map(str, version)) for version in (OLDEST, NEWEST_TESTED))
    wanted = f"wanted {oldest} or newer below {OLDEST[0] + 1} (tested up to {tested})"
    if found is None:
        try:
            found = importlib.metadata.version("transformers")
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"mxmoe.integrations.transformers found no transformers; {wanted}") from None
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
    if numbers < OLDEST or numbers[:1] != OLDEST[:1]:
        raise ImportError(f"mxmoe.integrations.transformers found transformers {found}; {wanted}")


check_version()
