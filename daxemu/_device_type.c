/* The Python type Device and the function stall, see _device.h. Limited API of CPython 3.11. */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_device_type.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    Py_buffer view; /* keeps the memory of the conditions while this object lives */
    struct device device;
    int aligned; /* O_DIRECT: memory must be */
} Device;

static PyTypeObject *device_type;

static PyObject *os_error(int code)
{
    errno = code;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *device_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "blocks", "conditions", "journal_fd", NULL};
    int fd, journal_fd = -1;
    long long blocks;
    PyObject *conditions = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iL|Oi", names, &fd, &blocks, &conditions, &journal_fd))
        return NULL;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    if (blocks < 0 || blocks > INT64_MAX / DEVICE_BLOCK)
        return os_error(EINVAL);
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Device *self = (Device *)alloc(type, 0);
    if (!self)
        return NULL;
    if (conditions != Py_None) {
        if (PyObject_GetBuffer(conditions, &self->view, PyBUF_WRITABLE) < 0) {
            self->view.obj = NULL;
            Py_DECREF(self);
            return NULL;
        }
        if ((uintptr_t)self->view.buf % 8 || self->view.len < (Py_ssize_t)sizeof(struct conditions)) {
            PyErr_Format(PyExc_ValueError, "conditions need %zu bytes of memory, aligned to 8", sizeof(struct conditions));
            Py_DECREF(self);
            return NULL;
        }
    }
    self->device = (struct device){fd, journal_fd, self->view.obj ? self->view.buf : NULL, (uint64_t)blocks};
    self->aligned = (flags & O_DIRECT) != 0;
    return (PyObject *)self;
}

static void device_dealloc(PyObject *object)
{
    Device *self = (Device *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->view.obj)
        PyBuffer_Release(&self->view);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

struct device *device_of(PyObject *object)
{
    if (device_type && PyObject_TypeCheck(object, device_type))
        return &((Device *)object)->device;
    PyErr_SetString(PyExc_TypeError, "a device must be a Device");
    return NULL;
}

/* The request, without the interpreter's lock; through aligned memory of its own where the device asks for that. */
static int request(Device *self, uint64_t block, Py_buffer *data, int write)
{
    const struct device *d = &self->device;
    uint64_t blocks = (uint64_t)data->len / DEVICE_BLOCK;
    void *memory = data->buf, *bounce = NULL;
    int failed = 0;
    Py_BEGIN_ALLOW_THREADS
    if (self->aligned && data->len && (uintptr_t)data->buf % DEVICE_BLOCK) {
        /* What is out of range may be huge, too: don't allocate for it. */
        if (blocks > d->blocks)
            failed = EIO;
        else if (!(memory = bounce = aligned_alloc(DEVICE_BLOCK, (size_t)data->len)))
            failed = ENOMEM;
        else if (write)
            memcpy(bounce, data->buf, (size_t)data->len);
    }
    if (!failed)
        failed = write ? device_write(d, block, blocks, memory) : device_read(d, block, blocks, memory);
    if (!failed && bounce && !write)
        memcpy(data->buf, bounce, (size_t)data->len);
    free(bounce);
    Py_END_ALLOW_THREADS
    return failed;
}

static PyObject *transfer(PyObject *object, PyObject *args, const char *format, int write)
{
    long long block;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, format, &block, &data))
        return NULL;
    int failed = block < 0 || data.len % DEVICE_BLOCK ? EINVAL : request((Device *)object, (uint64_t)block, &data, write);
    PyBuffer_Release(&data);
    return failed ? os_error(failed) : Py_NewRef(Py_None);
}

static PyObject *read_blocks(PyObject *self, PyObject *args)
{
    return transfer(self, args, "Lw*", 0);
}

static PyObject *write_blocks(PyObject *self, PyObject *args)
{
    return transfer(self, args, "Ly*", 1);
}

static PyObject *flush(PyObject *object, PyObject *unused)
{
    (void)unused;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = device_flush(&((Device *)object)->device);
    Py_END_ALLOW_THREADS
    return failed ? os_error(failed) : Py_NewRef(Py_None);
}

static PyObject *discard(PyObject *object, PyObject *args)
{
    long long block, blocks;
    int failed = EINVAL;
    if (!PyArg_ParseTuple(args, "LL", &block, &blocks))
        return NULL;
    if (block >= 0 && blocks >= 0) {
        Py_BEGIN_ALLOW_THREADS
        failed = device_discard(&((Device *)object)->device, (uint64_t)block, (uint64_t)blocks);
        Py_END_ALLOW_THREADS
    }
    return failed ? os_error(failed) : Py_NewRef(Py_None);
}

static PyObject *stall(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer memory;
    int on;
    if (!PyArg_ParseTuple(args, "w*p", &memory, &on))
        return NULL;
    int enough = !((uintptr_t)memory.buf % 8) && memory.len >= (Py_ssize_t)sizeof(struct conditions);
    if (enough)
        device_stall(memory.buf, on);
    PyBuffer_Release(&memory);
    return enough ? Py_NewRef(Py_None) : os_error(EINVAL);
}

static PyObject *forget(PyObject *object, PyObject *unused)
{
    (void)unused;
    struct device *d = &((Device *)object)->device;
    __atomic_store_n(&d->fd, -1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&d->journal_fd, -1, __ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

static PyObject *get_fd(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromLong(((Device *)object)->device.fd);
}

static PyObject *get_blocks(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(((Device *)object)->device.blocks);
}

static PyObject *get_journal_fd(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromLong(((Device *)object)->device.journal_fd);
}

static int set_journal_fd(PyObject *object, PyObject *value, void *unused)
{
    (void)unused;
    long fd = value ? PyLong_AsLong(value) : -1;
    if (fd == -1 && PyErr_Occurred())
        return -1;
    __atomic_store_n(&((Device *)object)->device.journal_fd, (int)fd, __ATOMIC_SEQ_CST);
    return 0;
}

static PyMethodDef methods[] = {
    {"read", read_blocks, METH_VARARGS, "read(block, buffer): fill a buffer of whole blocks."},
    {"write", write_blocks, METH_VARARGS, "write(block, buffer): write a buffer of whole blocks."},
    {"flush", flush, METH_NOARGS, "flush(): make durable what was written."},
    {"discard", discard, METH_VARARGS, "discard(block, blocks): their content is of no interest."},
    {"forget", forget, METH_NOARGS, "forget(): its descriptors are about to be closed; every later request is EBADF."},
    {NULL, NULL, 0, NULL},
};
static PyMethodDef functions[] = {
    {"stall", stall, METH_VARARGS, "stall(conditions, on): make requests under these conditions wait, or let them go on."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef getset[] = {
    {"fd", get_fd, NULL, "The descriptor; -1 once forgotten.", NULL},
    {"blocks", get_blocks, NULL, "Blocks of 4,096 bytes.", NULL},
    {"journal_fd", get_journal_fd, set_journal_fd, "Where requests are recorded, opened with O_APPEND; -1: nowhere.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot slots[] = {
    {Py_tp_doc, "Device(fd, blocks, conditions=None, journal_fd=-1): blocks of an open file, read and written by system calls."},
    {Py_tp_new, device_new},
    {Py_tp_dealloc, device_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {0, NULL},
};
static PyType_Spec spec = {
    "onecopy.daxemu._fault.Device", sizeof(Device), 0, Py_TPFLAGS_DEFAULT, slots,
};

int device_type_add(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&spec);
    if (!type)
        return -1;
    device_type = (PyTypeObject *)Py_NewRef(type);
    int failed = PyModule_AddObjectRef(module, "Device", type);
    Py_DECREF(type);
    return failed ? -1 : PyModule_AddFunctions(module, functions);
}
