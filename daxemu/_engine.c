/* Engine: one handle's part in faults and shootdowns, from its start to its end. */
#define _GNU_SOURCE
#include "_module.h"

#include "_cache.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

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
    struct stat status;
    e->huge = !fstat(pool_fd, &status) && status.st_blksize >= (blksize_t)(BLOCK * PAGE);
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
        caches_without(e);
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

struct engine *engine_of(PyObject *object)
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
    int failed = handler_install(SIGSEGV);
    if (!failed && handler_needed(SIGBUS))
        failed = handler_install(SIGBUS);
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
PyType_Spec engine_spec = {
    "onecopy.daxemu._fault.Engine", sizeof(Engine), 0, Py_TPFLAGS_DEFAULT, engine_slots,
};
