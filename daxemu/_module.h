/* The Python types over the native half, among themselves. See _fault.h. Limited API of CPython 3.11. */
#ifndef ONECOPY_MODULE_H
#define ONECOPY_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_fault.h"

typedef struct {
    PyObject_HEAD
    char *address;        /* first byte handed out; NULL once unmapped */
    char *reserved;       /* what mmap returned, before alignment */
    size_t reserved_size;
    Py_ssize_t length;    /* bytes handed out */
    Py_ssize_t exports;   /* live buffers; unmapping waits for them */
    PyObject *owner;      /* the Engine that maps it, if any */
    struct region region; /* known to the handler while there is an owner */
} Region;

typedef struct {
    PyObject_HEAD
    Py_buffer runtime, pool;
    struct engine engine;
    int closed;
} Engine;

extern PyType_Spec words_spec, region_spec, engine_spec;
extern PyTypeObject *region_type;

/* _module.c */
PyObject *os_error(int code); /* NULL, with the exception */

/* _engine.c */
struct engine *engine_of(PyObject *object); /* NULL with an exception when it has been closed */

/* _cache_type.c */
int cache_type_add(PyObject *module); /* 0, or -1 with an exception */

/* _entries.c: methods of Engine */
PyObject *engine_entries(PyObject *object, PyObject *args);
PyObject *engine_enter(PyObject *object, PyObject *args);
PyObject *engine_claim(PyObject *object, PyObject *args);
PyObject *engine_make_private(PyObject *object, PyObject *args);
PyObject *engine_freeze(PyObject *object, PyObject *args);
PyObject *engine_commit(PyObject *object, PyObject *args);
PyObject *engine_redo(PyObject *object, PyObject *unused);
PyObject *engine_bury(PyObject *object, PyObject *args);
PyObject *engine_await_faults(PyObject *object, PyObject *args);
PyObject *engine_map_for(PyObject *object, PyObject *args);
PyObject *engine_wait_dirty(PyObject *object, PyObject *args);
PyObject *engine_count(PyObject *object, PyObject *args);

#endif
