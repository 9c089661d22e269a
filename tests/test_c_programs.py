"""What a C compiler makes of the header, the library and the example, as they lie in the imported package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mxmoe
from mxmoe import _core

EXAMPLE = Path(__file__).parents[1] / "examples" / "c"
SOURCE = EXAMPLE / "moe_and_attention.c"
HEADER = Path(mxmoe.get_include()) / "mxmoe.h"
LIBRARY = Path(mxmoe.get_library())
# Programs that pip installed beside this Python count, whether or not their folder is on PATH.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]


def program(*names):
    found = next((path for path in (shutil.which(name, path=PATH) for name in names if name) if path), None)
    if found is None:
        pytest.skip(f"none of {', '.join(filter(None, names))} is installed")
    return found


def c_compiler():
    return program(os.environ.get("CC"), "cc", "gcc", "clang")


def cxx_compiler():
    return program(os.environ.get("CXX"), "c++", "g++", "clang++")


def run(*command, **environment):
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"PATH": PATH} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def compiled(source, program, *flags):
    """The command that stands in the example's head comment."""
    done = run(
        c_compiler(), "-std=c99", *STRICT, "-O2", *flags, source, "-o", program,
        f"-I{HEADER.parent}", LIBRARY, f"-Wl,-rpath,{LIBRARY.parent}", "-lm",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return program


def package_version():
    project = (EXAMPLE.parents[1] / "pyproject.toml").read_text()
    return re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1]


def assert_example_is_right(done, isa):
    assert done.returncode == 0, done.stdout + done.stderr
    first, moe, attention, last = done.stdout.splitlines()
    assert first == f"mxmoe {package_version()}, {isa}"
    for line, op in ((moe, "mxfp4_moe"), (attention, "sink_attention")):
        error = float(re.fullmatch(rf"{op} +largest error (\S+)  ok", line)[1])
        assert 0 < error < 1e-6  # float32 against double: neither the same numbers nor far apart
    assert last == "ok"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return compiled(SOURCE, tmp_path_factory.mktemp("example") / "moe_and_attention")


@pytest.mark.parametrize("name", _core.available_isas())
def test_example(example, name):
    assert_example_is_right(run(example, MXMOE_ISA=name), name)


def test_example_says_what_is_wrong(example):
    done = run(example, MXMOE_ISA="sse9")
    assert done.returncode == 1
    assert done.stderr.startswith("MXMOE_ISA is 'sse9'; wanted one of scalar, ")


@pytest.mark.parametrize(
    ("op", "right", "wrong"),
    [
        ("mxfp4_moe", "(clamped + 1.0)", "clamped"),
        ("mxfp4_moe", "k % 2 * 4", "(1 - k % 2) * 4"),
        ("sink_attention", "total = exp(sinks[h])", "total = 0.0 * sinks[h]"),
        ("sink_attention", "position - WINDOW + 1;", "position - WINDOW;"),
    ],
)
def test_the_example_can_fail(tmp_path, op, right, wrong):
    text = SOURCE.read_text()
    assert text.count(right) == 1
    source = tmp_path / "broken.c"
    source.write_text(text.replace(right, wrong))
    done = run(compiled(source, tmp_path / "broken"))
    assert done.returncode == 1
    assert re.search(rf"^{op} .* WRONG$", done.stdout, re.MULTILINE)
    assert done.stdout.count("WRONG") == 1
    assert done.stdout.endswith("FAILED\n")


def test_example_through_cmake(tmp_path):
    c_compiler()
    cmake = program("cmake")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    configured = run(
        cmake, "-S", EXAMPLE, "-B", tmp_path, *generator, f"-Dmxmoe_DIR={mxmoe.get_cmake_dir()}",
        f"-DCMAKE_C_FLAGS={' '.join(STRICT)}",
    )  # fmt: skip
    assert configured.returncode == 0, configured.stdout + configured.stderr
    built = run(cmake, "--build", tmp_path, "--verbose")
    assert built.returncode == 0, built.stdout + built.stderr
    assert_example_is_right(run(tmp_path / "moe_and_attention", MXMOE_ISA="scalar"), "scalar")


def cmake_project(tmp_path, wanted, package):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(user LANGUAGES C)\n"
        f"find_package(mxmoe {wanted} CONFIG REQUIRED)\nfind_package(mxmoe CONFIG REQUIRED)\n"
        "get_target_property(where mxmoe::mxmoe IMPORTED_LOCATION)\n"
        'message(STATUS "found [${mxmoe_VERSION}] [${where}]")\n'
    )
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    return run(program("cmake"), "-S", tmp_path, "-B", tmp_path / "build", *generator, f"-Dmxmoe_DIR={package}")


@pytest.fixture
def moved_package(tmp_path):
    """A copy of the package's C files elsewhere, as after moving an environment."""
    c_compiler()
    if not (Path(mxmoe.get_cmake_dir()) / "mxmoeConfigVersion.cmake").exists():
        pytest.fail("mxmoeConfigVersion.cmake is missing: cmake --install BUILD --prefix python puts it there")
    package = tmp_path / "elsewhere" / "mxmoe"
    for folder in (HEADER.parent, LIBRARY.parent, mxmoe.get_cmake_dir()):
        shutil.copytree(folder, package / Path(folder).name)
    return package


@pytest.mark.parametrize("exact", [True, False])
def test_cmake_finds_its_version_wherever_it_lies(tmp_path, moved_package, exact):
    version = re.match(r"\d+(\.\d+)*", package_version())[0]
    wanted = version if exact else ".".join(version.split(".")[:2])
    done = cmake_project(tmp_path, wanted, moved_package / "cmake")
    assert f"found [{version}] [{moved_package / 'lib' / LIBRARY.name}]" in done.stdout, done.stderr


def test_cmake_refuses_another_version(tmp_path, moved_package):
    done = cmake_project(tmp_path, "77.0", moved_package / "cmake")
    assert done.returncode != 0
    assert "77.0" in done.stderr


def test_cmake_misses_the_library(tmp_path, moved_package):
    (moved_package / "lib" / LIBRARY.name).unlink()
    done = cmake_project(tmp_path, "", moved_package / "cmake")
    assert done.returncode != 0
    assert re.sub(r"\s+", " ", done.stderr).count("is missing: this is no complete installation of mxmoe")


LAYOUT = """
#include <mxmoe.h>
typedef char size_is_right[sizeof(mxmoe_tensor) == 80 ? 1 : -1];
typedef char dtype_is_right[offsetof(mxmoe_tensor, dtype) == 8 ? 1 : -1];
typedef char shape_is_right[offsetof(mxmoe_tensor, shape) == 16 ? 1 : -1];
typedef char stride_is_right[offsetof(mxmoe_tensor, stride) == 48 ? 1 : -1];
typedef char batch_is_right[sizeof(mxmoe_attention_batch) == 4 * sizeof(void*) ? 1 : -1];
int main(void) { return mxmoe_check_abi(MXMOE_ABI_VERSION); }
"""


@pytest.mark.parametrize("language", ["c99", "c11", "c++17"])
def test_header_in(tmp_path, language):
    source = tmp_path / ("user.cpp" if "++" in language else "user.c")
    source.write_text(LAYOUT)
    compiler = cxx_compiler() if "++" in language else c_compiler()
    flags = [f"-std={language}", *STRICT, "-Wconversion", "-Wshadow", f"-I{HEADER.parent}"]
    done = run(compiler, *flags, source, "-o", tmp_path / "user", LIBRARY, f"-Wl,-rpath,{LIBRARY.parent}")
    assert done.returncode == 0, done.stderr
    assert run(tmp_path / "user").returncode == 0


def test_a_header_that_does_not_fit_is_noticed(tmp_path):
    (tmp_path / "user.c").write_text(LAYOUT.replace("== 80", "== 88"))
    done = run(c_compiler(), "-std=c99", "-fsyntax-only", f"-I{HEADER.parent}", tmp_path / "user.c")
    assert done.returncode != 0
    assert "size_is_right" in done.stderr


def test_the_library_exports_what_the_header_declares_and_nothing_else():
    if sys.platform != "linux":
        pytest.skip("nm -D reads ELF")
    declared = set(re.findall(r"^MXMOE_API [^;(]*?(mxmoe_\w+)\(", HEADER.read_text(), re.MULTILINE))
    assert len(declared) == HEADER.read_text().count("\nMXMOE_API ") > 20
    done = run(program("nm"), "-D", "--defined-only", LIBRARY)
    symbols = {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}
    assert symbols - {"MXMOE_1"} == declared  # and the name of their version


def test_the_library_needs_no_python():
    if sys.platform != "linux":
        pytest.skip("readelf reads ELF")
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\.so", run(program("readelf"), "-d", LIBRARY).stdout))
    assert "libc" in needed
    assert needed <= {"libc", "libm", "libstdc++", "libgcc_s", "libpthread", "libasan", "libubsan"} | {
        name for name in needed if name.startswith("ld-")
    }


def test_paths_of_a_package_without_them(monkeypatch, tmp_path):
    from mxmoe import c_interface

    monkeypatch.setattr(c_interface, "_PACKAGE", tmp_path)
    for function in (mxmoe.get_include, mxmoe.get_library, mxmoe.get_cmake_dir):
        with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))}.* is missing; wanted an installed"):
            function()
