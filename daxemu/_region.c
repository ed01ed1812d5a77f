/* Region: reserved addresses, as Python's memory. */
#define _GNU_SOURCE
#include "_module.h"

#include <sys/mman.h>

static PyObject *region_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Py_ssize_t length, alignment = PAGE;
    if (kwargs && PyDict_Size(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Region takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "n|n", &length, &alignment))
        return NULL;
    if (length < 0 || length > PY_SSIZE_T_MAX / 2 || alignment < (Py_ssize_t)PAGE ||
        (alignment & (alignment - 1))) {
        PyErr_Format(PyExc_ValueError, "length %zd and alignment %zd: need length >= 0 and a power of two >= %u",
                     length, alignment, PAGE);
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Region *self = (Region *)alloc(type, 0);
    if (!self)
        return NULL;
    size_t pages = ((size_t)length + PAGE - 1) & ~(size_t)(PAGE - 1);
    if (!pages)
        pages = PAGE;
    self->reserved_size = pages + (size_t)alignment - PAGE;
    /* Readable and private: a page that nobody maps over reads as the kernel's zero page and costs no memory. */
    self->reserved = mmap(NULL, self->reserved_size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (self->reserved == MAP_FAILED) {
        self->reserved = NULL;
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    uintptr_t first = ((uintptr_t)self->reserved + (uintptr_t)alignment - 1) & ~((uintptr_t)alignment - 1);
    self->address = (char *)first;
    self->length = length;
    return (PyObject *)self;
}

static void region_drop(Region *self)
{
    if (self->owner) {
        region_remove(&self->region);
        Py_CLEAR(self->owner);
    }
    if (self->reserved)
        munmap(self->reserved, self->reserved_size);
    self->reserved = self->address = NULL;
}

static void region_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    region_drop((Region *)object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static int region_live(Region *self)
{
    if (self->address)
        return 1;
    PyErr_SetString(PyExc_ValueError, "this mapping has been closed");
    return 0;
}

/* map(fd, runs): runs is an array of uint64 triples (page of the region, page of the file, pages). */
static PyObject *region_map(PyObject *object, PyObject *args)
{
    Region *self = (Region *)object;
    int fd;
    Py_buffer runs;
    if (!PyArg_ParseTuple(args, "iy*", &fd, &runs))
        return NULL;
    PyObject *result = NULL;
    const uint64_t *run = runs.buf;
    Py_ssize_t count = runs.len / (Py_ssize_t)(3 * sizeof(uint64_t));
    uint64_t pages = ((uint64_t)self->length + PAGE - 1) / PAGE;
    if (!region_live(self))
        goto out;
    for (Py_ssize_t i = 0; i < count; i++, run += 3) {
        if (!run[2] || run[0] >= pages || run[2] > pages - run[0]) {
            PyErr_Format(PyExc_ValueError, "run %zd (page %llu, %llu pages) is outside the region of %llu pages", i,
                         (unsigned long long)run[0], (unsigned long long)run[2], (unsigned long long)pages);
            goto out;
        }
        void *at = self->address + run[0] * PAGE;
        if (mmap(at, run[2] * PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, (off_t)(run[1] * PAGE)) ==
            MAP_FAILED) {
            PyErr_SetFromErrno(PyExc_OSError);
            goto out;
        }
    }
    result = Py_NewRef(Py_None);
out:
    PyBuffer_Release(&runs);
    return result;
}

static PyObject *region_unmap(PyObject *object, PyObject *unused)
{
    (void)unused;
    Region *self = (Region *)object;
    if (self->exports) {
        PyErr_Format(PyExc_BufferError, "%zd buffers or arrays still look into this mapping: delete them first",
                     self->exports);
        return NULL;
    }
    region_drop(self);
    Py_RETURN_NONE;
}

static int region_getbuffer(PyObject *object, Py_buffer *view, int flags)
{
    Region *self = (Region *)object;
    if (!region_live(self)) {
        view->obj = NULL;
        return -1;
    }
    if (PyBuffer_FillInfo(view, object, self->address, self->length, !self->region.writable, flags) < 0)
        return -1;
    self->exports++;
    return 0;
}

static void region_releasebuffer(PyObject *object, Py_buffer *view)
{
    (void)view;
    ((Region *)object)->exports--;
}

static Py_ssize_t region_length(PyObject *object)
{
    return ((Region *)object)->length;
}

static PyObject *region_address(PyObject *object, void *unused)
{
    (void)unused;
    Region *self = (Region *)object;
    return region_live(self) ? PyLong_FromVoidPtr(self->address) : NULL;
}

static PyObject *region_closed(PyObject *object, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((Region *)object)->address == NULL);
}

static PyMethodDef region_methods[] = {
    {"map", region_map, METH_VARARGS,
     "map(fd, runs): map runs of the file, read-only; runs are uint64 triples (region page, file page, pages)."},
    {"unmap", region_unmap, METH_NOARGS, "unmap(): give the addresses back; BufferError while buffers are exported."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef region_getset[] = {
    {"address", region_address, NULL, "First byte's address.", NULL},
    {"closed", region_closed, NULL, "True once unmapped.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot region_slots[] = {
    {Py_tp_doc, "Region(length, alignment=4096): reserved addresses, zeros until runs of a file are mapped there."},
    {Py_tp_new, region_new},
    {Py_tp_dealloc, region_dealloc},
    {Py_tp_methods, region_methods},
    {Py_tp_getset, region_getset},
    {Py_sq_length, region_length},
    {Py_bf_getbuffer, region_getbuffer},
    {Py_bf_releasebuffer, region_releasebuffer},
    {0, NULL},
};
PyType_Spec region_spec = {
    "onecopy.daxemu._fault.Region", sizeof(Region), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, region_slots,
};
