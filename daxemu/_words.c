/* Words: 64-bit words that processes share. */
#include "_module.h"

typedef struct {
    PyObject_HEAD
    Py_buffer view; /* keeps the memory mapped while this object lives */
    uint64_t *words;
    Py_ssize_t count;
} Words;

static PyObject *words_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *source;
    if (kwargs && PyDict_Size(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Words takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O", &source))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Words *self = (Words *)alloc(type, 0);
    if (!self)
        return NULL;
    if (PyObject_GetBuffer(source, &self->view, PyBUF_WRITABLE) < 0) {
        self->view.obj = NULL;
        Py_DECREF(self);
        return NULL;
    }
    if ((uintptr_t)self->view.buf % sizeof(uint64_t) || self->view.len % (Py_ssize_t)sizeof(uint64_t)) {
        PyErr_SetString(PyExc_ValueError, "Words needs memory aligned to 8 bytes and a multiple of 8 bytes long");
        Py_DECREF(self);
        return NULL;
    }
    self->words = self->view.buf;
    self->count = self->view.len / (Py_ssize_t)sizeof(uint64_t);
    return (PyObject *)self;
}

static void words_dealloc(PyObject *object)
{
    Words *self = (Words *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->view.obj)
        PyBuffer_Release(&self->view);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static uint64_t *word_at(Words *self, Py_ssize_t index)
{
    if (!self->words) {
        PyErr_SetString(PyExc_ValueError, "the memory of these words has been released");
        return NULL;
    }
    if (index < 0 || index >= self->count) {
        PyErr_Format(PyExc_IndexError, "word %zd of %zd", index, self->count);
        return NULL;
    }
    return self->words + index;
}

static PyObject *words_load(PyObject *self, PyObject *args)
{
    Py_ssize_t index;
    if (!PyArg_ParseTuple(args, "n", &index))
        return NULL;
    uint64_t *word = word_at((Words *)self, index);
    return word ? PyLong_FromUnsignedLongLong(__atomic_load_n(word, __ATOMIC_SEQ_CST)) : NULL;
}

static PyObject *words_store(PyObject *self, PyObject *args)
{
    Py_ssize_t index;
    unsigned long long value;
    if (!PyArg_ParseTuple(args, "nK", &index, &value))
        return NULL;
    uint64_t *word = word_at((Words *)self, index);
    if (!word)
        return NULL;
    __atomic_store_n(word, (uint64_t)value, __ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

static PyObject *words_swap_if(PyObject *self, PyObject *args)
{
    Py_ssize_t index;
    unsigned long long expected, value;
    if (!PyArg_ParseTuple(args, "nKK", &index, &expected, &value))
        return NULL;
    uint64_t *word = word_at((Words *)self, index);
    if (!word)
        return NULL;
    uint64_t seen = expected;
    return PyBool_FromLong(__atomic_compare_exchange_n(word, &seen, (uint64_t)value, 0, __ATOMIC_SEQ_CST,
                                                       __ATOMIC_SEQ_CST));
}

static PyObject *words_release(PyObject *object, PyObject *unused)
{
    (void)unused;
    Words *self = (Words *)object;
    self->words = NULL;
    self->count = 0;
    if (self->view.obj)
        PyBuffer_Release(&self->view);
    Py_RETURN_NONE;
}

static PyMethodDef words_methods[] = {
    {"load", words_load, METH_VARARGS, "load(index) -> int: one word, sequentially consistent."},
    {"store", words_store, METH_VARARGS, "store(index, value): one word, sequentially consistent."},
    {"swap_if", words_swap_if, METH_VARARGS,
     "swap_if(index, expected, value) -> bool: store value if the word holds expected; True when it did."},
    {"release", words_release, METH_NOARGS, "release(): let go of the memory; every later access is a ValueError."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot words_slots[] = {
    {Py_tp_doc, "Words(buffer): 64-bit words shared between processes, each access atomic and ordered."},
    {Py_tp_new, words_new},
    {Py_tp_dealloc, words_dealloc},
    {Py_tp_methods, words_methods},
    {0, NULL},
};
PyType_Spec words_spec = {
    "onecopy.daxemu._fault.Words", sizeof(Words), 0, Py_TPFLAGS_DEFAULT, words_slots,
};
