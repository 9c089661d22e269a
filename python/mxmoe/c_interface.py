"""Where compilers find the C interface that comes with the package: header, shared library, CMake configuration."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["get_cmake_dir", "get_include", "get_library"]

_PACKAGE = Path(__file__).resolve().parent


def _existing(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; wanted an installed mxmoe, or a source tree it was built into")
    return str(path)


def get_include() -> str:
    """Folder of ``mxmoe.h``, for the compiler's ``-I``.

    Returns
    -------
    str
        Absolute path.

    Raises
    ------
    FileNotFoundError
        The header is not there.
    """
    return str(Path(_existing(_PACKAGE / "include" / "mxmoe.h")).parent)


def get_library() -> str:
    """Path of the shared library with the functions of ``mxmoe.h``.

    It holds the kernels and nothing of Python, needs the C++ standard library at run time and chooses the instruction
    set there. Its threads, chosen instruction set and working memory are its own, apart from those of `mxmoe.ops`.

    Returns
    -------
    str
        Absolute path of ``libmxmoe.so`` (``libmxmoe.dylib`` on macOS, ``mxmoe.dll`` on Windows).

    Raises
    ------
    FileNotFoundError
        The library is not there, as in a source tree that was not built.
    """
    names = {"darwin": "libmxmoe.dylib", "win32": "mxmoe.dll"}
    return _existing(_PACKAGE / "lib" / names.get(sys.platform, "libmxmoe.so"))


def get_cmake_dir() -> str:
    """Folder of ``mxmoeConfig.cmake``, for CMake's ``-Dmxmoe_DIR=``.

    ``find_package(mxmoe CONFIG REQUIRED)`` then gives the target ``mxmoe::mxmoe``.

    Returns
    -------
    str
        Absolute path.

    Raises
    ------
    FileNotFoundError
        The configuration is not there.
    """
    return str(Path(_existing(_PACKAGE / "cmake" / "mxmoeConfig.cmake")).parent)
