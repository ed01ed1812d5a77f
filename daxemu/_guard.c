/* See _fault.h for the contract. Waiting, the guard, and what a fork waits for. */
#define _GNU_SOURCE
#include "_cache.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LOCK_BASE (1ll << 40) /* as in daxemu/slots.py: a byte beyond the run-time file's end names a slot */

void (*fault_step)(int);

static uint32_t guard;           /* 0 free, 1 held, 2 held and waited for */
static uint32_t gate, inflight;  /* gate 1: a fork is under way, new faults wait */
static struct engine *engines;
static struct cache *caches;

/* ------------------------------------------------------------- waiting */

int futex_wait(uint32_t *word, uint32_t value, long milliseconds)
{
    struct timespec limit = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    return syscall(SYS_futex, word, FUTEX_WAIT, value, milliseconds ? &limit : NULL, NULL, 0) ? errno : 0;
}

void futex_wake(uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

void block_signals(sigset_t *before)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, before);
}

void restore_signals(const sigset_t *before)
{
    pthread_sigmask(SIG_SETMASK, before, NULL);
}

void guard_lock(void)
{
    uint32_t seen = 0;
    if (__atomic_compare_exchange_n(&guard, &seen, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return;
    while (__atomic_exchange_n(&guard, 2, __ATOMIC_ACQUIRE))
        futex_wait(&guard, 2, 0);
}

void guard_unlock(void)
{
    if (__atomic_exchange_n(&guard, 0, __ATOMIC_RELEASE) == 2)
        futex_wake(&guard);
}

void guard_enter(sigset_t *before)
{
    block_signals(before);
    guard_lock();
}

void guard_leave(const sigset_t *before)
{
    guard_unlock();
    restore_signals(before);
}

int slot_alive(struct engine *e, uint32_t slot)
{
    struct flock range = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = LOCK_BASE + slot, .l_len = 1};
    return fcntl(e->runtime_fd, F_OFD_GETLK, &range) || range.l_type != F_UNLCK;
}

/* ---------------------------------------------------------------- fork */

/*
 * A fork copies this process's page tables at one moment; a fault that is half done then would leave the child with a
 * translation that nobody tells it to drop. So a fork waits for the faults under way, and new ones for the fork. Then the
 * child's slot is made a mapper of all that we map: it answers nobody before the fork is done, and a fault of ours would wait
 * for it. From closing the gate to opening it no Python runs: the forking thread holds the interpreter's lock, and would lose it
 * to a thread that faults and waits at the gate.
 */
void fault_enter(void)
{
    for (;;) {
        __atomic_fetch_add(&inflight, 1, __ATOMIC_SEQ_CST);
        if (!__atomic_load_n(&gate, __ATOMIC_SEQ_CST))
            return;
        fault_leave();
        futex_wait(&gate, 1, 0);
    }
}

void fault_leave(void)
{
    if (__atomic_sub_fetch(&inflight, 1, __ATOMIC_SEQ_CST) == 0 && __atomic_load_n(&gate, __ATOMIC_SEQ_CST))
        futex_wake(&inflight);
}

static void close_gate(void)
{
    for (uint32_t open = 0; !__atomic_compare_exchange_n(&gate, &open, 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); open = 0)
        futex_wait(&gate, 1, 0); /* another thread forks */
    for (uint32_t left; (left = __atomic_load_n(&inflight, __ATOMIC_SEQ_CST));)
        futex_wait(&inflight, left, 10);
}

static void open_gate(void)
{
    __atomic_store_n(&gate, 0, __ATOMIC_SEQ_CST);
    futex_wake(&gate);
}

static void before_fork(void)
{
    close_gate();
    for (struct engine *e = engines; e; e = e->next)
        for (uint32_t space = 0; e->child_slot >= 0 && space < *e->spaces_used; space++) {
            uint64_t *mappers = e->spaces[space].mappers;
            if (__atomic_load_n(&mappers[e->slot / 64], __ATOMIC_SEQ_CST) >> e->slot % 64 & 1)
                __atomic_fetch_or(&mappers[e->child_slot / 64], 1ull << e->child_slot % 64, __ATOMIC_SEQ_CST);
        }
    guard_lock(); /* last, and only for the fork itself: until now our service thread answers those we wait for */
}

static void after_fork(void)
{
    guard_unlock();
    open_gate();
}

static void in_parent(void)
{
    for (struct engine *e = engines; e; e = e->next) {
        for (int i = 0; e->child_slot >= 0 && i < 2; i++)
            if (e->child_fds[i] >= 0)
                close(e->child_fds[i]); /* its slot lives as long as the child does, from now on */
        e->child_slot = -1;
    }
    for (struct cache *c = caches; c; c = c->next) {
        if (c->child_fd >= 0)
            close(c->child_fd);
        c->child_fd = -1;
    }
    after_fork();
}

static void in_child(void)
{
    for (struct engine *e = engines; e; e = e->next) {
        if (e->alive && e->child_slot < 0) /* nobody would tell us when a page moves */
            evict_all(e);
        if (e->cache)
            evict_all(e); /* nobody watches over what it maps: mapped anew when it is touched */
        e->alive = 0; /* until it gets a slot and a service thread of its own */
        e->child_slot = -1;
        memset(e->busy, 0, sizeof e->busy);
    }
    for (struct cache *c = caches; c; c = c->next)
        cache_in_child(c);
    inflight = 0; /* a thread that only looked at the gate is not here to leave */
    after_fork();
}

/*
 * The translations that fork copied may be older than the child's slot as a mapper: a message that was on its way to the parent is none
 * to the child, and the parent's answer is for the parent's translations alone. So all are made anew, by a look at the entries
 * now that the slot is a mapper; what comes after that is in its bell, for the service thread.
 */
int adopt(struct engine *e, uint32_t slot)
{
    int failed = 0;
    e->slot = slot;
    e->incarnation = e->incarnations[slot * 8];
    e->dirty = 0;
    for (uint32_t space = 0; space < SPACES && !failed; space++)
        for (struct region *r = e->chain[space]; r && !failed; r = r->next)
            if (e->spaces[space].pages)
                failed = map_region(r, 0, r->pages);
    return failed ? failed : service_start(e);
}

static void register_fork(void)
{
    static int registered;
    if (!registered)
        registered = !pthread_atfork(before_fork, in_parent, in_child);
}

void engines_add(struct engine *e)
{
    sigset_t before;
    guard_enter(&before);
    e->next = engines;
    engines = e;
    register_fork();
    guard_leave(&before);
}

void engines_remove(struct engine *e)
{
    sigset_t before;
    guard_enter(&before);
    for (struct engine **at = &engines; *at; at = &(*at)->next)
        if (*at == e) {
            *at = e->next;
            break;
        }
    guard_leave(&before);
}

void caches_add(struct cache *c)
{
    sigset_t before;
    guard_enter(&before);
    c->next = caches;
    caches = c;
    register_fork();
    guard_leave(&before);
}

/* Where its frames were there are zeros from now on: somebody may still be reading there, without a lock, and is told afterwards that
 * the handle is closed. Watched by nobody, frames that are absent would get pages of zeros, for all processes. */
void caches_remove(struct cache *c)
{
    sigset_t before;
    block_signals(&before);
    close_gate();
    guard_lock();
    for (struct cache **at = &caches; *at; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            c->closed = 1;
            mmap(c->pool, c->frames * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
            break;
        }
    guard_unlock();
    open_gate();
    restore_signals(&before);
}

void caches_without(struct engine *e)
{
    sigset_t before;
    block_signals(&before);
    close_gate();
    if (e->cache)
        e->cache->engine = NULL;
    e->cache = NULL;
    open_gate();
    restore_signals(&before);
}

struct cache *cache_around(const char *address)
{
    for (struct cache *c = caches; c; c = c->next)
        if (address >= c->pool && address < c->pool + c->frames * PAGE)
            return c;
    return NULL;
}
