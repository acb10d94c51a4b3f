# cython: language_level=3, boundscheck=False, wraparound=False
"""libFuzzer under a Python function: run(target, arguments) calls target(memoryview) once per input.

Built by `FASTKIN_BUILD=fuzz` only, see ci/variant. The module is loaded before the extensions it watches, so
that their counters find libFuzzer. The memory of an input ends with it: AddressSanitizer sees one byte too far.
For code in Python, trace() counts the lines that were run and the ways between them as libFuzzer's counters do.
"""

from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport abort, malloc
from libc.string cimport memset

import sys
import traceback

cdef extern from *:
    """
    #include <stdint.h>
    #include <sanitizer/asan_interface.h>
    #include "frameobject.h"
    #define EXTRA (1 << 13)
    __attribute__((used, section("__libfuzzer_extra_counters"))) static uint8_t extra[EXTRA];
    typedef int (*one_input)(const uint8_t *, size_t);
    int LLVMFuzzerRunDriver(int *argc, char ***argv, one_input callback);
    """
    enum:
        EXTRA
    uint8_t* extra
    ctypedef int (*one_input)(const uint8_t*, size_t) noexcept
    int LLVMFuzzerRunDriver(int* argc, char*** argv, one_input callback) noexcept
    void __asan_poison_memory_region(const void*, size_t) noexcept
    void __asan_unpoison_memory_region(const void*, size_t) noexcept

cdef extern from "Python.h":
    ctypedef int (*tracefunc)(PyObject*, PyObject*, int, PyObject*) noexcept
    int PyTrace_LINE
    void PyEval_SetTrace(tracefunc, PyObject*) noexcept
    int PyFrame_GetLineNumber(PyObject*) noexcept
    PyObject* PyFrame_GetCode(PyObject*) noexcept

cdef object _target
cdef tuple _watched = ()


cdef int one(const uint8_t* data, size_t size) noexcept:
    try:
        view = PyMemoryView_FromMemory(<char*> data, <Py_ssize_t> size, PyBUF_READ)
        _target(view)
        view.release()
    except BaseException:
        # libFuzzer writes the input to a file and ends the process
        traceback.print_exc()
        sys.stderr.flush()
        abort()
    return 0


def run(target, arguments):
    """Does not return before libFuzzer has done its work; then it ends the process."""
    global _target
    _target = target
    kept = [argument.encode() for argument in arguments]
    cdef int count = <int> len(kept)
    cdef int i
    cdef char** argv = <char**> malloc((count + 1) * sizeof(char*))
    for i in range(count):
        argv[i] = kept[i]
    argv[count] = NULL
    return LLVMFuzzerRunDriver(&count, &argv, one)


def close_end(bytes data not None):
    """The NUL behind a bytes object is out of bounds from now on. open_end() before it is freed."""
    __asan_poison_memory_region(PyBytes_AS_STRING(data) + PyBytes_GET_SIZE(data), 1)


def open_end(bytes data not None):
    __asan_unpoison_memory_region(PyBytes_AS_STRING(data) + PyBytes_GET_SIZE(data), 1)


# -- lines of Python as coverage

cdef struct Known:
    PyObject* code
    bint watched

cdef Known known[8192]
cdef uint64_t before = 0


cdef bint is_watched(PyObject* code) noexcept:
    """Is this code of a watched module? Code objects of modules live as long as we do."""
    cdef Known* place = &known[(<size_t> code >> 4) & 8191]
    if place.code != code:
        name = (<object> code).co_filename
        place.code = code
        place.watched = any([part in name for part in _watched])
    return place.watched


cdef int line(PyObject* nothing, PyObject* frame, int what, PyObject* argument) noexcept:
    global before
    cdef PyObject* code
    cdef uint64_t here
    cdef uint8_t* counter
    if what != PyTrace_LINE:
        return 0
    code = PyFrame_GetCode(frame)
    if is_watched(code):
        here = (<uint64_t> <size_t> code * <uint64_t> 0x9E3779B97F4A7C15 >> 20) + <uint64_t> PyFrame_GetLineNumber(frame)
        counter = &extra[(here ^ (before << 1)) * <uint64_t> 0x9E3779B97F4A7C15 >> 51]
        if counter[0] < 255:
            counter[0] += 1
        before = here
    Py_DECREF(<object> code)
    return 0


def trace(tuple parts):
    """Count lines run in files whose path has one of these parts."""
    global _watched
    _watched = parts
    memset(known, 0, sizeof(known))
    PyEval_SetTrace(line, NULL)
