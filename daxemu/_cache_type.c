/* The Python type Cache, see _cache.h: one handle's use of a buffer cache. Limited API of CPython 3.11. */
#define _GNU_SOURCE
#include "_module.h"

#include "_cache.h"
#include "_device_type.h"

#include <errno.h>
#include <fcntl.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BOUNCE (4 * AHEAD * (size_t)PAGE)
#define CHUNK (64 * (size_t)PAGE)

typedef struct {
    PyObject_HEAD
    Py_buffer pool;
    PyObject *device;
    struct cache cache;
    int closed;
} Cache;

static PyTypeObject *cache_type;

static void *map_control(int fd, uint64_t at, uint64_t size)
{
    void *got = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)at);
    return got == MAP_FAILED ? NULL : got;
}

/*
 * Our name as a user is a lock, which lasts as long as the description that it is on: one that nothing else uses. What is mapped
 * through a description keeps it, also in a child.
 */
static int reopen_control(struct cache *c)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", c->control_fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return errno;
    close(c->control_fd);
    c->control_fd = fd;
    return 0;
}

static void cache_close_all(Cache *self)
{
    struct cache *c = &self->cache;
    self->closed = 1;
    caches_remove(c);
    if (c->engine)
        c->engine->cache = NULL;
    c->engine = NULL;
    if (c->header)
        munmap(c->header, WORDS_AT);
    if (c->words)
        munmap(c->words, DEVICES * SPAN * 8);
    if (c->owners)
        munmap(c->owners, COPIES * 8);
    if (c->windows)
        munmap(c->windows, SPACES * 16);
    if (c->bounce)
        munmap(c->bounce, BOUNCE);
    if (c->lost)
        munmap(c->lost, c->frames / 8 + 1);
    int *fds[] = {&c->control_fd, &c->frames_fd, &c->uffd, &c->child_fd};
    for (size_t n = 0; n < sizeof fds / sizeof *fds; n++) {
        if (*fds[n] >= 0)
            close(*fds[n]);
        *fds[n] = -1;
    }
    c->header = NULL;
    c->words = c->owners = c->windows = NULL;
    c->bounce = NULL;
    c->lost = NULL;
    if (self->pool.obj)
        PyBuffer_Release(&self->pool);
    Py_CLEAR(self->device);
}

static PyObject *cache_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *pool, *device;
    int control_fd, frames_fd, per_inode;
    unsigned int number;
    if (kwargs && PyDict_Size(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Cache takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "iiOOIp", &control_fd, &frames_fd, &pool, &device, &number, &per_inode))
        return NULL;
    struct device *native = device_of(device);
    if (!native || number >= DEVICES) {
        if (native)
            PyErr_Format(PyExc_ValueError, "device %u of a cache of %u", number, DEVICES);
        return NULL;
    }
    Cache *self = (Cache *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self)
        return NULL;
    struct cache *c = &self->cache;
    c->control_fd = control_fd; /* ours from now on */
    c->frames_fd = frames_fd;
    c->uffd = c->child_fd = -1;
    if (PyObject_GetBuffer(pool, &self->pool, PyBUF_WRITABLE) < 0)
        goto fail;
    self->device = Py_NewRef(device);
    c->device = native;
    c->read_only = (fcntl(native->fd, F_GETFL) & O_ACCMODE) == O_RDONLY;
    c->base = number * SPAN;
    c->pool = self->pool.buf;
    c->frames = (uint64_t)self->pool.len / PAGE;
    c->header = map_control(control_fd, 0, WORDS_AT);
    c->kept = c->header ? &c->header->kept[number] : NULL;
    c->words = map_control(control_fd, WORDS_AT, DEVICES * SPAN * 8);
    c->owners = map_control(control_fd, OWNERS_AT + number * COPIES * 8, COPIES * 8);
    c->windows = per_inode ? map_control(control_fd, WINDOWS_AT + number * (SPACES * 16ull), SPACES * 16) : NULL;
    c->bounce = mmap(NULL, BOUNCE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (c->bounce == MAP_FAILED)
        c->bounce = NULL;
    c->lost = mmap(NULL, c->frames / 8 + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (c->lost == MAP_FAILED)
        c->lost = NULL;
    if (!c->header || !c->words || !c->owners || !c->bounce || !c->lost || (per_inode && !c->windows)) {
        os_error(ENOMEM);
        goto fail;
    }
    mlock(c->bounce, BOUNCE); /* where it may: a page of it must not be swapped out while it is copied from */
    int failed = reopen_control(c);
    if (!failed)
        failed = cache_join(c->control_fd, c->header, &c->holder);
    if (!failed) {
        c->uffd = cache_watching();
        failed = c->uffd < 0 ? -c->uffd : cache_watch(c, c->pool, c->frames * PAGE);
    }
    if (!failed)
        failed = handler_install(SIGBUS);
    if (failed) {
        os_error(failed);
        goto fail;
    }
    caches_add(c);
    return (PyObject *)self;
fail:
    cache_close_all(self);
    Py_DECREF(self);
    return NULL;
}

static void cache_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    if (!((Cache *)object)->closed)
        cache_close_all((Cache *)object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

/* NULL with a ValueError when the object is no Cache, or closed. */
struct cache *cache_of(PyObject *object)
{
    if (!PyObject_TypeCheck(object, cache_type) || ((Cache *)object)->closed) {
        PyErr_SetString(PyExc_ValueError, "no cache, or one that is closed");
        return NULL;
    }
    return &((Cache *)object)->cache;
}

static PyObject *result(int failed)
{
    return failed ? os_error(failed) : Py_NewRef(Py_None);
}

/* Parse (pfn, pages) within the pool. */
static struct cache *frames_of(PyObject *object, PyObject *args, unsigned long long *pfn, unsigned long long *pages)
{
    struct cache *c = cache_of(object);
    if (!c || !PyArg_ParseTuple(args, "KK", pfn, pages))
        return NULL;
    if (*pfn > c->frames || *pages > c->frames - *pfn) {
        PyErr_Format(PyExc_ValueError, "frames %llu and %llu pages are not in the pool", *pfn, *pages);
        return NULL;
    }
    return c;
}

/* Signals are blocked while frames are held: a handler that touches an absent frame would wait for its own thread. Another thread may
 * have closed the cache in the meantime. */
#define QUIETLY(statement) \
    do { \
        sigset_t before; \
        Py_BEGIN_ALLOW_THREADS \
        block_signals(&before); \
        fault_enter(); \
        if (!c->closed) { \
            statement; \
        } \
        fault_leave(); \
        restore_signals(&before); \
        Py_END_ALLOW_THREADS \
    } while (0)

static PyObject *cache_fetch(PyObject *object, PyObject *args)
{
    unsigned long long pfn, pages, ahead;
    struct cache *c = cache_of(object);
    int failed = 0;
    if (!c || !PyArg_ParseTuple(args, "KKK", &pfn, &pages, &ahead))
        return NULL;
    if (pfn > c->frames || pages > c->frames - pfn) {
        PyErr_Format(PyExc_ValueError, "frames %llu and %llu pages are not in the pool", pfn, pages);
        return NULL;
    }
    uint64_t end = pfn + pages + (ahead < AHEAD ? ahead : AHEAD);
    if (end > c->frames)
        end = c->frames;
    while (pages && cache_is_there(c, c->base + pfn)) {
        pfn++;
        pages--;
    }
    if (!pages)
        Py_RETURN_NONE;
    QUIETLY(for (uint64_t n = 0; n < pages && !failed; n++)
                failed = cache_need(c, c->base + pfn + n, pfn + n, end - pfn - n, NULL));
    return cache_of(object) ? result(failed) : NULL;
}

static PyObject *cache_store_bytes(PyObject *object, PyObject *args)
{
    struct cache *c = cache_of(object);
    unsigned long long offset;
    Py_buffer data;
    if (!c || !PyArg_ParseTuple(args, "Ky*", &offset, &data))
        return NULL;
    uint64_t left = (uint64_t)data.len;
    int failed = offset > c->frames * PAGE || left > c->frames * PAGE - offset ? EINVAL : 0;
    char *copy = failed ? NULL : malloc(left < CHUNK ? left + 1 : CHUNK);
    if (!copy && !failed)
        failed = ENOMEM;
    for (const char *from = data.buf; left && !failed;) {
        uint64_t part = left < CHUNK - offset % PAGE ? left : CHUNK - offset % PAGE;
        memcpy(copy, from, part); /* here, where a touch of an absent frame is a signal; the kernel would say EFAULT */
        QUIETLY(failed = cache_store(c, offset, copy, part));
        offset += part;
        from += part;
        left -= part;
    }
    free(copy);
    PyBuffer_Release(&data);
    return result(failed);
}

static PyObject *cache_ready_frames(PyObject *object, PyObject *args)
{
    unsigned long long pfn, pages;
    struct cache *c = frames_of(object, args, &pfn, &pages);
    int failed = 0;
    if (!c)
        return NULL;
    QUIETLY(failed = cache_ready(c, pfn, pages));
    return result(failed);
}

static PyObject *cache_write(PyObject *object, PyObject *args)
{
    unsigned long long pfn, pages;
    struct cache *c = frames_of(object, args, &pfn, &pages);
    int failed = 0;
    if (!c)
        return NULL;
    QUIETLY(failed = cache_write_back(c, pfn, pages));
    return result(failed);
}

static PyObject *cache_drop_frames(PyObject *object, PyObject *args)
{
    unsigned long long pfn, pages;
    struct cache *c = frames_of(object, args, &pfn, &pages);
    if (!c)
        return NULL;
    QUIETLY(cache_drop(c, c->base + pfn, pages));
    Py_RETURN_NONE;
}

static PyObject *cache_shrink(PyObject *object, PyObject *unused)
{
    (void)unused;
    struct cache *c = cache_of(object);
    if (!c)
        return NULL;
    QUIETLY(for (uint64_t over = frames_over(c), before = UINT64_MAX; over && over < before; over = frames_over(c)) {
        frames_evict(c, over);
        before = over;
    });
    Py_RETURN_NONE;
}

static PyObject *cache_trim_frames(PyObject *object, PyObject *unused)
{
    (void)unused;
    struct cache *c = cache_of(object);
    if (!c)
        return NULL;
    QUIETLY(cache_trim(c));
    Py_RETURN_NONE;
}

/* losses() -> a number that goes up when the pool's memory shows zeros for a block that could not be read. All is shown anew. */
static PyObject *cache_losses(PyObject *object, PyObject *unused)
{
    (void)unused;
    struct cache *c = cache_of(object);
    if (!c)
        return NULL;
    int failed = handler_install(SIGBUS); /* in front of one that the program has set since: that would not bring in what is absent */
    if (failed)
        return os_error(failed);
    uint32_t losses = __atomic_load_n(&c->losses, __ATOMIC_SEQ_CST);
    if (losses & 1 || __atomic_load_n(&c->shown, __ATOMIC_SEQ_CST)) {
        QUIETLY(cache_show(c, 0, c->frames));
        sigset_t before;
        guard_enter(&before); /* until none is being made */
        losses = __atomic_load_n(&c->losses, __ATOMIC_SEQ_CST);
        guard_leave(&before);
    }
    return PyLong_FromUnsignedLong(losses);
}

static PyObject *cache_lost(PyObject *object, PyObject *args)
{
    struct cache *c = cache_of(object);
    unsigned int since;
    if (!c || !PyArg_ParseTuple(args, "I", &since))
        return NULL;
    if (__atomic_load_n(&c->losses, __ATOMIC_SEQ_CST) == since)
        Py_RETURN_NONE;
    QUIETLY(cache_show(c, 0, c->frames));
    sigset_t before;
    guard_enter(&before);
    int failed = c->failed;
    uint64_t pfn = c->failed_block;
    guard_leave(&before);
    return Py_BuildValue("(iK)", failed ? failed : EIO, (unsigned long long)pfn);
}

static PyObject *cache_expect_child(PyObject *object, PyObject *args)
{
    struct cache *c = cache_of(object);
    int fd;
    if (!c || !PyArg_ParseTuple(args, "i", &fd))
        return NULL;
    int failed = cache_join(fd, c->header, &c->child_holder);
    if (failed)
        return os_error(failed);
    c->child_fd = fd;
    Py_RETURN_NONE;
}

static PyObject *cache_set_window(PyObject *object, PyObject *args)
{
    struct cache *c = cache_of(object);
    unsigned int space;
    unsigned long long first, pages;
    if (!c || !PyArg_ParseTuple(args, "IKK", &space, &first, &pages))
        return NULL;
    if (!c->windows || space >= SPACES || first > SPAN - COPIES || pages > SPAN - COPIES - first) {
        PyErr_SetString(PyExc_ValueError, "no copies for inodes in this cache, or no such space");
        return NULL;
    }
    c->windows[2 * space + 1] = pages;
    __atomic_store_n(&c->windows[2 * space], pages ? c->base + COPIES + first : 0, __ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

static PyObject *cache_window(PyObject *object, PyObject *args)
{
    struct cache *c = cache_of(object);
    unsigned int space;
    if (!c || !PyArg_ParseTuple(args, "I", &space))
        return NULL;
    int has = c->windows && space < SPACES;
    return Py_BuildValue("(KK)", has ? (unsigned long long)c->windows[2 * space] : 0, has ? (unsigned long long)c->windows[2 * space + 1] : 0);
}

static PyObject *cache_drop_copies(PyObject *object, PyObject *args)
{
    struct cache *c = cache_of(object);
    unsigned long long first, frames;
    if (!c || !PyArg_ParseTuple(args, "KK", &first, &frames))
        return NULL;
    QUIETLY(cache_drop(c, first, frames));
    Py_RETURN_NONE;
}

static PyObject *cache_close(PyObject *object, PyObject *unused)
{
    (void)unused;
    if (!((Cache *)object)->closed)
        cache_close_all((Cache *)object);
    Py_RETURN_NONE;
}

static PyObject *cache_use(PyObject *object, PyObject *args)
{
    struct cache *c = cache_of(object);
    PyObject *engine;
    if (!c || !PyArg_ParseTuple(args, "O", &engine))
        return NULL;
    struct engine *e = engine == Py_None ? NULL : engine_of(engine);
    if (engine != Py_None && !e)
        return NULL;
    if (c->engine)
        c->engine->cache = NULL;
    c->engine = e;
    if (e)
        e->cache = c;
    Py_RETURN_NONE;
}

static PyMethodDef cache_methods[] = {
    {"use", cache_use, METH_VARARGS, "use(engine): the engine's faults find their frames here; None: no engine's do any more."},
    {"fetch", cache_fetch, METH_VARARGS, "fetch(pfn, pages, ahead): make them resident; what has to be read is read with so many more. Counts as a use. OSError (EIO)."},
    {"store", cache_store_bytes, METH_VARARGS, "store(offset, data): store bytes of the pool; the frames are dirty."},
    {"ready", cache_ready_frames, METH_VARARGS, "ready(pfn, pages): give frames pages, zeros if they had none, that stay until they are written back. ENOSPC."},
    {"write_back", cache_write, METH_VARARGS, "write_back(pfn, pages): write the dirty ones to the device. OSError (EIO, ENOSPC)."},
    {"drop", cache_drop_frames, METH_VARARGS, "drop(pfn, pages): forget them; what was dirty is lost."},
    {"shrink", cache_shrink, METH_NOARGS, "shrink(): evict down to the limit."},
    {"trim", cache_trim_frames, METH_NOARGS, "trim(): forget what is on the device, too."},
    {"losses", cache_losses, METH_NOARGS, "losses() -> number: for lost(); the pool's memory shows all blocks, as far as they can be read."},
    {"lost", cache_lost, METH_VARARGS, "lost(since) -> (errno, pfn) or None: the last block that it could not show, if there was one since losses()."},
    {"expect_child", cache_expect_child, METH_VARARGS, "expect_child(control_fd): a user's number for the next fork's child, on a description of its own."},
    {"set_window", cache_set_window, METH_VARARGS, "set_window(space, first, pages): an inode's copies, counted from the device's first one; 0 pages: it has none."},
    {"window", cache_window, METH_VARARGS, "window(space) -> (frame, pages): an inode's copies; 0: it has none."},
    {"drop_copies", cache_drop_copies, METH_VARARGS, "drop_copies(frame, frames): forget copies of an inode."},
    {"close", cache_close, METH_NOARGS, "close(): let go of the cache; nothing may be mapped any more."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot cache_slots[] = {
    {Py_tp_doc, "Cache(control_fd, frames_fd, pool, device, number, per_inode): a handle's use of a buffer cache; owns the descriptors."},
    {Py_tp_new, cache_new},
    {Py_tp_dealloc, cache_dealloc},
    {Py_tp_methods, cache_methods},
    {0, NULL},
};
static PyType_Spec cache_spec = {"onecopy.daxemu._fault.Cache", sizeof(Cache), 0, Py_TPFLAGS_DEFAULT, cache_slots};

int cache_type_add(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&cache_spec);
    if (!type)
        return -1;
    cache_type = (PyTypeObject *)type;
    return PyModule_AddObjectRef(module, "Cache", type);
}
