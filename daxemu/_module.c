/* The Python types over the native half: Words, Region, Engine. See _fault.h. Limited API of CPython 3.11. */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_device_type.h"
#include "_fault.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
    PyObject_HEAD
    Py_buffer view; /* keeps the memory mapped while this object lives */
    uint64_t *words;
    Py_ssize_t count;
} Words;

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

static PyObject *os_error(int code)
{
    errno = code;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* ---------------------------------------------------------------- Words */

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
static PyType_Spec words_spec = {
    "onecopy.daxemu._fault.Words", sizeof(Words), 0, Py_TPFLAGS_DEFAULT, words_slots,
};

/* --------------------------------------------------------------- Region */

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
static PyType_Spec region_spec = {
    "onecopy.daxemu._fault.Region", sizeof(Region), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, region_slots,
};

/* --------------------------------------------------------------- Engine */

/* Offsets in the run-time file, in the order of runtime.NATIVE. */
enum { INCARNATIONS, TABLE, SPACE_AREA, RECORD_AREA, BELLS, COUNTERS, LOG_AREA, WINDOWS, LIVE, FREE, FLOOR, LOG_COUNT, LOG_GENERATION, LOG_OWNER,
       SPACES_USED, OFFSETS };

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *runtime, *pool;
    int runtime_fd, pool_fd;
    unsigned int slot;
    unsigned long long reserve;
    Py_buffer offsets;
    if (kwargs && PyDict_Size(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Engine takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OOiiIKy*", &runtime, &pool, &runtime_fd, &pool_fd, &slot, &reserve, &offsets))
        return NULL;
    const uint64_t *at = offsets.buf;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Engine *self = NULL;
    if (offsets.len != OFFSETS * 8 || slot >= SLOTS) {
        PyErr_Format(PyExc_ValueError, "Engine wants %d offsets and a slot below %u", OFFSETS, SLOTS);
        goto out;
    }
    self = (Engine *)alloc(type, 0);
    if (!self)
        goto out;
    self->closed = 1;
    struct engine *e = &self->engine;
    e->end_fd = -1;
    e->child_slot = -1;
    if (PyObject_GetBuffer(runtime, &self->runtime, PyBUF_WRITABLE) < 0 || PyObject_GetBuffer(pool, &self->pool, PyBUF_SIMPLE) < 0)
        goto fail;
    e->base = self->runtime.buf;
    e->pool = self->pool.buf;
    e->frames = (uint64_t)self->pool.len / PAGE;
    e->table = (uint8_t *)e->base + at[TABLE];
    e->spaces = (struct space *)(e->base + at[SPACE_AREA]);
    e->records = (struct record *)(e->base + at[RECORD_AREA]);
    e->bells = (struct bell *)(e->base + at[BELLS]);
    e->counters = (struct counters *)(e->base + at[COUNTERS]);
    e->log = (struct run *)(e->base + at[LOG_AREA]);
    e->windows = at[WINDOWS];
    e->live = (uint64_t *)(e->base + at[LIVE]);
    e->free = (uint64_t *)(e->base + at[FREE]);
    e->floor = (uint64_t *)(e->base + at[FLOOR]);
    e->log_count = (uint64_t *)(e->base + at[LOG_COUNT]);
    e->log_generation = (uint64_t *)(e->base + at[LOG_GENERATION]);
    e->log_owner = (uint64_t *)(e->base + at[LOG_OWNER]);
    e->spaces_used = (uint64_t *)(e->base + at[SPACES_USED]);
    e->runtime_fd = runtime_fd;
    e->pool_fd = pool_fd;
    e->incarnations = (uint64_t *)(e->base + at[INCARNATIONS]);
    e->slot = slot;
    e->incarnation = e->incarnations[slot * 8];
    e->reserve = reserve;
    e->window = calloc(SPACES, sizeof *e->window);
    e->chain = calloc(SPACES, sizeof *e->chain);
    e->end_fd = memfd_create("onecopy-end", MFD_CLOEXEC);
    if (!e->window || !e->chain || e->end_fd < 0) {
        os_error(e->end_fd < 0 ? errno : ENOMEM);
        goto fail;
    }
    engines_add(e);
    self->closed = 0;
    goto out;
fail:
    Py_CLEAR(self);
out:
    PyBuffer_Release(&offsets);
    return (PyObject *)self;
}

static void engine_drop(Engine *self)
{
    struct engine *e = &self->engine;
    if (!self->closed) {
        self->closed = 1;
        __atomic_fetch_or(&e->dirty, 1u << 31, __ATOMIC_SEQ_CST); /* who waits to fold looks, and finds us closed */
        futex_wake(&e->dirty);
        Py_BEGIN_ALLOW_THREADS
        service_stop(e);
        Py_END_ALLOW_THREADS
        engines_remove(e);
        for (uint32_t space = 0; space < SPACES; space++)
            if (e->window[space])
                munmap(e->window[space], LOCKS + MAX_PAGES * 8);
    }
    free(e->window);
    free(e->chain);
    e->window = NULL;
    e->chain = NULL;
    if (e->end_fd >= 0)
        close(e->end_fd);
    e->end_fd = -1;
    if (self->runtime.obj)
        PyBuffer_Release(&self->runtime);
    if (self->pool.obj)
        PyBuffer_Release(&self->pool);
}

static void engine_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    engine_drop((Engine *)object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static struct engine *engine_of(PyObject *object)
{
    if (((Engine *)object)->closed) {
        PyErr_SetString(PyExc_ValueError, "this handle on the pool has been closed");
        return NULL;
    }
    return &((Engine *)object)->engine;
}

static PyObject *engine_start(PyObject *object, PyObject *unused)
{
    (void)unused;
    struct engine *e = engine_of(object);
    if (!e)
        return NULL;
    if (!e->alive) {
        int failed = service_start(e);
        if (failed)
            return os_error(failed);
    }
    int failed = handler_install();
    return failed ? os_error(failed) : Py_NewRef(Py_None);
}

static PyObject *engine_adopt(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    unsigned int slot;
    int pool_fd;
    if (!e || !PyArg_ParseTuple(args, "Ii", &slot, &pool_fd))
        return NULL;
    e->slot = slot;
    e->incarnation = e->incarnations[slot * 8];
    e->pool_fd = pool_fd;
    e->dirty = 0;
    int failed = 0;
    for (uint32_t space = 0; space < SPACES && !failed; space++)
        for (struct region *r = e->chain[space]; r && !failed; r = r->next)
            if (e->spaces[space].pages)
                failed = map_region(r, 0, r->pages);
    if (!failed)
        failed = service_start(e);
    return failed ? os_error(failed) : Py_NewRef(Py_None);
}

static PyObject *engine_expect_child(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    int slot, fd, other;
    if (!e || !PyArg_ParseTuple(args, "iii", &slot, &fd, &other))
        return NULL;
    e->child_fds[0] = fd;
    e->child_fds[1] = other;
    e->child_slot = slot;
    Py_RETURN_NONE;
}

static PyObject *engine_lose(PyObject *object, PyObject *unused)
{
    (void)unused;
    struct engine *e = engine_of(object);
    if (!e)
        return NULL;
    sigset_t before;
    guard_enter(&before);
    for (uint32_t space = 0; space < SPACES; space++)
        for (struct region *r = e->chain[space]; r; r = r->next)
            evict(r);
    guard_leave(&before);
    Py_RETURN_NONE;
}

static PyObject *engine_close(PyObject *object, PyObject *unused)
{
    (void)unused;
    if (!((Engine *)object)->closed)
        engine_drop((Engine *)object);
    Py_RETURN_NONE;
}

static PyTypeObject *region_type;

static PyObject *engine_add(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    PyObject *target;
    unsigned int space, granule;
    int writable;
    if (!e || !PyArg_ParseTuple(args, "O!IpI", region_type, &target, &space, &writable, &granule))
        return NULL;
    Region *self = (Region *)target;
    if (!self->address || self->owner || space >= SPACES || granule > BLOCK || (granule & (granule - 1))) {
        PyErr_SetString(PyExc_ValueError, "a closed or mapped region, or a space or granule that can't be");
        return NULL;
    }
    struct region *r = &self->region;
    r->engine = e;
    r->address = self->address;
    r->pages = ((uint64_t)self->length + PAGE - 1) / PAGE;
    if (!r->pages)
        r->pages = 1;
    r->space = space;
    r->writable = writable;
    r->fixed = granule != 0;
    r->granule = granule ? granule : FEW;
    r->streak = UINT64_MAX;
    self->owner = Py_NewRef(object);
    region_add(r);
    Py_RETURN_NONE;
}

static PyObject *engine_refresh(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    PyObject *target;
    if (!e || !PyArg_ParseTuple(args, "O!", region_type, &target))
        return NULL;
    struct region *r = &((Region *)target)->region;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = map_region(r, 0, r->pages);
    Py_END_ALLOW_THREADS
    return failed ? os_error(failed) : Py_NewRef(Py_None);
}

/* The window of `space` and its entries; NULL with an exception when [low, high) is not within what it has room for. */
static uint64_t *window_entries(struct engine *e, unsigned int space, unsigned long long low, unsigned long long high)
{
    if (space >= SPACES || low > high || high > MAX_PAGES) {
        PyErr_Format(PyExc_ValueError, "space %u has no pages %llu to %llu", space, low, high);
        return NULL;
    }
    uint64_t *entries = entries_of(e, space);
    if (!entries)
        os_error(ENOMEM);
    return entries;
}

static PyObject *engine_entries(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    unsigned int space;
    unsigned long long low, high;
    if (!e || !PyArg_ParseTuple(args, "IKK", &space, &low, &high))
        return NULL;
    const uint64_t *entries = window_entries(e, space, low, high);
    if (!entries)
        return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)((high - low) * 8));
    uint64_t *to = bytes ? (uint64_t *)PyBytes_AsString(bytes) : NULL;
    for (uint64_t page = low; to && page < high; page++)
        *to++ = __atomic_load_n(&entries[page], __ATOMIC_ACQUIRE);
    return bytes;
}

static PyObject *engine_enter(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    unsigned int space;
    unsigned long long low;
    Py_buffer words;
    if (!e || !PyArg_ParseTuple(args, "IKy*", &space, &low, &words))
        return NULL;
    uint64_t count = (uint64_t)words.len / 8, *entries = window_entries(e, space, low, low + count);
    for (uint64_t i = 0; entries && i < count; i++)
        __atomic_store_n(&entries[low + i], ((const uint64_t *)words.buf)[i], __ATOMIC_RELEASE);
    PyBuffer_Release(&words);
    return entries ? Py_NewRef(Py_None) : NULL;
}

static PyObject *engine_claim(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    unsigned long long pfn, pages;
    unsigned char state;
    if (!e || !PyArg_ParseTuple(args, "KKb", &pfn, &pages, &state))
        return NULL;
    if (pfn >= e->frames || pages > e->frames - pfn) {
        PyErr_Format(PyExc_ValueError, "frames %llu and %llu pages are not in the pool", pfn, pages);
        return NULL;
    }
    return PyBool_FromLong(claim(e, pfn, pages, state) != 0);
}

static PyObject *engine_make_private(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    unsigned int space;
    unsigned long long low, high;
    int map, failed;
    if (!e || !PyArg_ParseTuple(args, "IKKp", &space, &low, &high, &map) || !window_entries(e, space, low, high))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = make_private(e, space, low, high, map);
    Py_END_ALLOW_THREADS
    return failed ? os_error(failed) : Py_NewRef(Py_None);
}

static PyObject *engine_freeze(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    unsigned int space;
    unsigned long long low, high;
    long patience;
    if (!e || !PyArg_ParseTuple(args, "IKKl", &space, &low, &high, &patience) || !window_entries(e, space, low, high))
        return NULL;
    if (high > e->spaces[space].pages) {
        PyErr_SetString(PyExc_ValueError, "freeze goes beyond the entries");
        return NULL;
    }
    uint32_t stuck = 0;
    int failed;
    PyObject *words = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)((high - low) * 8));
    if (!words)
        return NULL;
    uint64_t *to = (uint64_t *)PyBytes_AsString(words);
    Py_BEGIN_ALLOW_THREADS
    failed = freeze(e, space, low, high, to, patience, &stuck);
    Py_END_ALLOW_THREADS
    if (!failed)
        return words;
    Py_DECREF(words);
    return failed == ETIMEDOUT ? PyLong_FromUnsignedLong(stuck) : os_error(failed);
}

static PyObject *engine_commit(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    unsigned long long generation;
    if (!e || !PyArg_ParseTuple(args, "K", &generation))
        return NULL;
    int64_t result;
    Py_BEGIN_ALLOW_THREADS
    result = commit(e, generation);
    Py_END_ALLOW_THREADS
    return result < -1 ? os_error((int)(-2 - result)) : PyLong_FromLongLong(result);
}

static PyObject *engine_redo(PyObject *object, PyObject *unused)
{
    (void)unused;
    struct engine *e = engine_of(object);
    if (!e)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    redo(e);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *engine_bury(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    unsigned int slot;
    if (!e || !PyArg_ParseTuple(args, "I", &slot))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    bury(e, slot % SLOTS);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *engine_map_for(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    unsigned int space, slot;
    int on;
    if (!e || !PyArg_ParseTuple(args, "IIp", &space, &slot, &on))
        return NULL;
    uint64_t *word = &e->spaces[space % SPACES].mappers[slot % SLOTS / 64], bit = 1ull << slot % 64;
    if (on)
        __atomic_fetch_or(word, bit, __ATOMIC_SEQ_CST);
    else
        __atomic_fetch_and(word, ~bit, __ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

static PyObject *engine_wait_dirty(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    unsigned int limit;
    long milliseconds;
    if (!e || !PyArg_ParseTuple(args, "Il", &limit, &milliseconds))
        return NULL;
    e->fold_at = limit;
    uint32_t seen = __atomic_load_n(&e->dirty, __ATOMIC_SEQ_CST);
    Py_BEGIN_ALLOW_THREADS
    if (seen < limit)
        futex_wait(&e->dirty, seen, milliseconds);
    seen = __atomic_load_n(&e->dirty, __ATOMIC_SEQ_CST);
    Py_END_ALLOW_THREADS
    if (seen >= limit)
        __atomic_fetch_sub(&e->dirty, seen, __ATOMIC_SEQ_CST);
    return PyBool_FromLong(seen >= limit);
}

static PyObject *engine_count(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    const char *name;
    long long by;
    if (!e || !PyArg_ParseTuple(args, "sL", &name, &by))
        return NULL;
    uint64_t *word = !strcmp(name, "strays") ? &e->counters->strays
                     : !strcmp(name, "epoch") ? &e->counters->epoch
                     : !strcmp(name, "dirty") ? &e->counters->dirty
                                              : (uint64_t *)&e->counters->held;
    return PyLong_FromLongLong((int64_t)__atomic_add_fetch(word, (uint64_t)by, __ATOMIC_SEQ_CST));
}

static PyMethodDef engine_methods[] = {
    {"start", engine_start, METH_NOARGS, "start(): run the service thread, and put the fault handler in front."},
    {"adopt", engine_adopt, METH_VARARGS, "adopt(slot, pool_fd): in a forked child: a slot, a service thread, current translations."},
    {"expect_child", engine_expect_child, METH_VARARGS,
     "expect_child(slot, fd, fd): the next fork makes the slot a mapper of all that we map, and closes the descriptors in the parent."},
    {"lose", engine_lose, METH_NOARGS, "lose(): in a forked child that has no slot: no translation stays, every touch is a SIGSEGV."},
    {"close", engine_close, METH_NOARGS, "close(): stop the service thread, let go of the memory; regions are unmapped before."},
    {"add", engine_add, METH_VARARGS, "add(region, space, writable, granule): make a region known; granule 0: as it suits."},
    {"refresh", engine_refresh, METH_VARARGS, "refresh(region): map a known region as the space's entries say."},
    {"entries", engine_entries, METH_VARARGS, "entries(space, low, high) -> bytes: the entries, each read whole."},
    {"enter", engine_enter, METH_VARARGS, "enter(space, low, words): store entries of a space that nobody maps by them yet."},
    {"claim", engine_claim, METH_VARARGS, "claim(pfn, pages, state) -> bool: take frames if all are free."},
    {"make_private", engine_make_private, METH_VARARGS, "make_private(space, low, high, map): what a store to each page would do; map: so that this process can store there, too."},
    {"freeze", engine_freeze, METH_VARARGS,
     "freeze(space, low, high, patience) -> bytes or int: no page stays private; the entries then, or the slot of a process that "
     "did not answer: then all is as it was."},
    {"commit", engine_commit, METH_VARARGS,
     "commit(generation) -> int: publish and apply the log; -1, or the run that stores conflict with: then nothing happened."},
    {"redo", engine_redo, METH_NOARGS, "redo(): finish what a dead process published."},
    {"bury", engine_bury, METH_VARARGS, "bury(slot): take over a dead process's blocks, forget its mappings."},
    {"map_for", engine_map_for, METH_VARARGS, "map_for(space, slot, on): enter or strike a mapper."},
    {"wait_dirty", engine_wait_dirty, METH_VARARGS, "wait_dirty(limit, ms) -> bool: whether this process stored to so many pages."},
    {"count", engine_count, METH_VARARGS, "count(name, by) -> int: add to 'held', 'dirty', 'strays' or 'epoch'."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot engine_slots[] = {
    {Py_tp_doc, "Engine(runtime, pool, runtime_fd, pool_fd, slot, reserve, offsets): one handle's part in faults and shootdowns."},
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_methods, engine_methods},
    {0, NULL},
};
static PyType_Spec engine_spec = {
    "onecopy.daxemu._fault.Engine", sizeof(Engine), 0, Py_TPFLAGS_DEFAULT, engine_slots,
};

/* --------------------------------------------------------------- module */

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
    return Py_BuildValue("(nnnnn)", sizeof(struct space), sizeof(struct record), sizeof(struct bell), sizeof(struct run),
                         sizeof(struct counters));
}

static PyObject *install(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    int failed = handler_install();
    return failed ? os_error(failed) : Py_NewRef(Py_None);
}

static PyMethodDef module_methods[] = {
    {"install", install, METH_NOARGS, "install(): put the fault handler in front, if it isn't."},
    {"signal_at", signal_at, METH_VARARGS, "signal_at(step, nth, signal): send it to this process at the nth arrival at a step."},
    {"sizes", sizes, METH_NOARGS, "sizes() -> bytes of space, record, bell, run and counters, for the test of the records' tables."},
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
    return device_type_add(module);
}

static PyModuleDef_Slot fault_slots[] = {{Py_mod_exec, fault_exec}, {0, NULL}};
static struct PyModuleDef fault_module = {
    PyModuleDef_HEAD_INIT, "_fault", "Atomic words, mapped regions, write faults.", 0, module_methods, fault_slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__fault(void)
{
    return PyModuleDef_Init(&fault_module);
}
