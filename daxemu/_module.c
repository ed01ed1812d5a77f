/* The module: its types, and functions that belong to none. */
#define _GNU_SOURCE
#include "_module.h"

#include "_cache.h"
#include "_device_type.h"

#include <errno.h>
#include <unistd.h>

PyTypeObject *region_type;

PyObject *os_error(int code)
{
    errno = code;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static int die_at = -1, die_after, die_with;

static void die(int step)
{
    if (step == die_at && __atomic_sub_fetch(&die_after, 1, __ATOMIC_SEQ_CST) == 0)
        kill(getpid(), die_with);
}

static PyObject *signal_at(PyObject *module, PyObject *args)
{
    (void)module;
    if (!PyArg_ParseTuple(args, "iii", &die_at, &die_after, &die_with))
        return NULL;
    fault_step = die_at >= 0 ? die : NULL;
    Py_RETURN_NONE;
}

static PyObject *sizes(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return Py_BuildValue("(nnnnnn)", sizeof(struct space), sizeof(struct record), sizeof(struct bell), sizeof(struct run),
                         sizeof(struct counters), sizeof(struct cache_header));
}

static PyObject *install(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    int failed = handler_install(SIGSEGV);
    if (!failed && handler_needed(SIGBUS))
        failed = handler_install(SIGBUS);
    return failed ? os_error(failed) : Py_NewRef(Py_None);
}

static PyMethodDef module_methods[] = {
    {"install", install, METH_NOARGS, "install(): put the fault handler in front, if it isn't."},
    {"signal_at", signal_at, METH_VARARGS, "signal_at(step, nth, signal): send it to this process at the nth arrival at a step."},
    {"sizes", sizes, METH_NOARGS, "sizes() -> bytes of space, record, bell, run, counters and cache header, for the test of the records' tables."},
    {NULL, NULL, 0, NULL},
};

static int fault_exec(PyObject *module)
{
    struct { const char *name; PyType_Spec *spec; } types[] = {
        {"Words", &words_spec}, {"Region", &region_spec}, {"Engine", &engine_spec}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        PyObject *type = PyType_FromSpec(types[i].spec);
        if (!type)
            return -1;
        if (types[i].spec == &region_spec)
            region_type = (PyTypeObject *)Py_NewRef(type);
        int failed = PyModule_AddObjectRef(module, types[i].name, type);
        Py_DECREF(type);
        if (failed)
            return -1;
    }
    return device_type_add(module) || cache_type_add(module) ? -1 : 0;
}

static PyModuleDef_Slot fault_slots[] = {{Py_mod_exec, fault_exec}, {0, NULL}};
static struct PyModuleDef fault_module = {
    PyModuleDef_HEAD_INIT, "_fault", "Atomic words, mapped regions, write faults.", 0, module_methods, fault_slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__fault(void)
{
    return PyModuleDef_Init(&fault_module);
}
