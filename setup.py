"""Builds the two extension modules. Metadata lives in pyproject.toml.

FASTKIN_BUILD chooses the mode:
  release   (default) -O3: its inlining takes a tenth off the instructions of a PUBLISH; no assertions
  trace     line tracing for coverage: about four times slower
  sanitize  AddressSanitizer and UBSan; run with ci/variant
  fuzz      the same by clang, with libFuzzer's counters and its driver; needs CC=clang, run with ci/variant
FASTKIN_ANNOTATE=1 writes Cython's annotated HTML beside the sources.
"""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

MODE = os.environ.get("FASTKIN_BUILD", "release")
WARN = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
CLANG = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=function,pointer-overflow",  # Python's own ways: a call by another type, nothing plus 0
    "-fno-sanitize-recover=undefined",
    "-shared-libasan",
]
FLAGS: dict[str, tuple[list[str], list[str], list[tuple[str, str | None]]]] = {
    "release": (["-O3", "-g0", "-fvisibility=hidden"], [], [("NDEBUG", None)]),
    "trace": (
        ["-O0", "-g"],
        [],
        [
            ("CYTHON_TRACE", "1"),
            ("CYTHON_TRACE_NOGIL", "1"),
            ("CYTHON_USE_SYS_MONITORING", "0"),
        ],
    ),
    "sanitize": (
        ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"],
        ["-fsanitize=address,undefined"],
        [("FASTKIN_SANITIZE", "1")],
    ),
    "fuzz": (
        ["-O2", "-g", "-UNDEBUG", "-fno-omit-frame-pointer", *CLANG, "-fsanitize=fuzzer-no-link"],
        CLANG,
        [("FASTKIN_SANITIZE", "1")],
    ),
}
if MODE not in FLAGS:
    sys.exit(f"FASTKIN_BUILD={MODE!r} is unknown: use one of {', '.join(FLAGS)}")
compile_args, link_args, macros = FLAGS[MODE]
# gcc lets inlining make a unit 40 % larger, and takes what pays least first when that is used up. So a function added
# anywhere in mqtt/ could take Ledger._begin out of the path of a PUBLISH: 3 % of the instructions of a read.
ROOM = {"mqtt._core": ["--param=inline-unit-growth=60"]} if MODE == "release" else {}


def extension(name: str, *headers: str) -> Extension:
    return Extension(
        f"fastkin.{name}",
        [f"src/fastkin/{name.replace('.', '/')}.pyx"],
        depends=[f"src/fastkin/{header}" for header in headers],
        include_dirs=["src/fastkin"],
        extra_compile_args=[*WARN, *compile_args, *ROOM.get(name, [])],
        extra_link_args=link_args,
        define_macros=macros,
    )


def fuzzing() -> list[Extension]:
    """What ci/variant builds beside the two modules: the driver with libFuzzer in it, and the targets."""
    libfuzzer = os.environ["FASTKIN_LIBFUZZER"]
    whole = ["-Wl,--whole-archive", libfuzzer, "-Wl,--no-whole-archive", "-lstdc++", "-lpthread", "-ldl", "-lm"]
    quiet = ["-O1", "-g", "-fsanitize=address", "-shared-libasan", "-w"]
    return [
        Extension(
            "fuzz_driver",
            ["tests/fuzz/fuzz_driver.pyx"],
            extra_compile_args=quiet,
            extra_link_args=["-fsanitize=address", "-shared-libasan", *whole],
        ),
        Extension("fuzz_targets", ["tests/fuzz/fuzz_targets.py"], extra_compile_args=["-O2", "-w"]),
    ]


setup(
    ext_modules=cythonize(
        [
            extension(
                "_codec",
                "codec/base64.h",
                "codec/pattern.h",
                "codec/random.h",
                "codec/md5.h",
                "codec/content.h",
                "mqtt/digest.h",
            ),
            extension("mqtt._core", "mqtt/digest.h", "mqtt/text.h"),
            *(fuzzing() if MODE == "fuzz" else ()),
        ],
        include_path=["src"],
        compiler_directives={
            "language_level": 3,
            "embedsignature": True,
            "embedsignature.format": "python",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "linetrace": MODE == "trace",
        },
        annotate=os.environ.get("FASTKIN_ANNOTATE") == "1",
        force=MODE != "release",
    ),
)
