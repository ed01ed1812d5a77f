/*
 * The native half of onecopy: what the memory model or the page tables demand and Python cannot say.
 *
 *   Words   64-bit words in memory shared between processes, read and written with sequential consistency.
 *           Python's own stores have no fence: on x86 a store may pass a later load, and the readers' protocol
 *           (announce a generation, then look whether it still is the live one) breaks without it.
 *   Region  a reserved range of addresses whose pages are mapped one run at a time (MAP_FIXED) and which exports
 *           one contiguous buffer. Python's mmap can do neither.
 *
 * Contract: no callback into Python, no lock, no allocation beyond the objects themselves. Every system call's
 * failure becomes an OSError with its errno. All calls are made with the interpreter lock held.
 */
#ifndef ONECOPY_FAULT_H
#define ONECOPY_FAULT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define ONECOPY_PAGE 4096u

typedef struct {
    PyObject_HEAD
    Py_buffer view;      /* keeps the memory mapped while this object lives */
    uint64_t *words;
    Py_ssize_t count;
} Words;

typedef struct {
    PyObject_HEAD
    char *address;       /* first byte handed out; NULL once unmapped */
    char *reserved;      /* what mmap returned, before alignment */
    size_t reserved_size;
    Py_ssize_t length;   /* bytes handed out */
    Py_ssize_t exports;  /* live buffers; unmapping waits for them */
} Region;

#endif
