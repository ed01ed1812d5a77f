/* Engine's methods over entries, frames, transactions, mappers and counters. */
#include "_module.h"

#include <errno.h>
#include <string.h>

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

PyObject *engine_entries(PyObject *object, PyObject *args)
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

PyObject *engine_enter(PyObject *object, PyObject *args)
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

PyObject *engine_claim(PyObject *object, PyObject *args)
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

PyObject *engine_make_private(PyObject *object, PyObject *args)
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

PyObject *engine_freeze(PyObject *object, PyObject *args)
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

PyObject *engine_commit(PyObject *object, PyObject *args)
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

PyObject *engine_redo(PyObject *object, PyObject *unused)
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

PyObject *engine_bury(PyObject *object, PyObject *args)
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

PyObject *engine_await_faults(PyObject *object, PyObject *args)
{
    struct engine *e = engine_of(object);
    unsigned int space;
    if (!e || !PyArg_ParseTuple(args, "I", &space))
        return NULL;
    if (space >= SPACES || (e->spaces[space].pages && !locks_of(e, space)))
        return os_error(space >= SPACES ? EINVAL : ENOMEM);
    Py_BEGIN_ALLOW_THREADS
    await_faults(e, space);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *engine_map_for(PyObject *object, PyObject *args)
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

PyObject *engine_wait_dirty(PyObject *object, PyObject *args)
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

PyObject *engine_count(PyObject *object, PyObject *args)
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
