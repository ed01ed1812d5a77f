/* See _fault.h for the contract. A process's regions and how it hears that a page has moved. */
#define _GNU_SOURCE
#include "_fault.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
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
static struct region **regions;  /* ascending by address: what the handler looks in */
static size_t region_count, region_room;
static uint64_t maps, maps_limit; /* estimate of this process's mappings, never too low; and what we allow ourselves */
static uint64_t maps_counted;     /* what the last count found */
static int maps_evicted;          /* an eviction came before it */

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

static void before_fork(void)
{
    for (uint32_t open = 0; !__atomic_compare_exchange_n(&gate, &open, 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); open = 0)
        futex_wait(&gate, 1, 0); /* another thread forks */
    for (uint32_t left; (left = __atomic_load_n(&inflight, __ATOMIC_SEQ_CST));)
        futex_wait(&inflight, left, 10);
    for (struct engine *e = engines; e; e = e->next)
        for (uint32_t space = 0; e->child_slot >= 0 && space < *e->spaces_used; space++) {
            uint64_t *mappers = e->spaces[space].mappers;
            if (__atomic_load_n(&mappers[e->slot / 64], __ATOMIC_SEQ_CST) >> e->slot % 64 & 1)
                __atomic_fetch_or(&mappers[e->child_slot / 64], 1ull << e->child_slot % 64, __ATOMIC_SEQ_CST);
        }
    guard_lock(); /* last, and only for the fork itself: until now our service thread answers those we wait for */
}

static void open_gate(void)
{
    guard_unlock();
    __atomic_store_n(&gate, 0, __ATOMIC_SEQ_CST);
    futex_wake(&gate);
}

static void in_parent(void)
{
    for (struct engine *e = engines; e; e = e->next) {
        for (int i = 0; e->child_slot >= 0 && i < 2; i++)
            if (e->child_fds[i] >= 0)
                close(e->child_fds[i]); /* its slot lives as long as the child does, from now on */
        e->child_slot = -1;
    }
    open_gate();
}

static void in_child(void)
{
    for (struct engine *e = engines; e; e = e->next) {
        if (e->alive && e->child_slot < 0) /* nobody would tell us when a page moves */
            for (size_t i = 0; i < region_count; i++)
                if (regions[i]->engine == e)
                    evict(regions[i]);
        e->alive = 0; /* until it gets a slot and a service thread of its own */
        e->child_slot = -1;
        memset(e->busy, 0, sizeof e->busy);
    }
    inflight = 0; /* a thread that only looked at the gate is not here to leave */
    open_gate();
}

void engines_add(struct engine *e)
{
    static int registered;
    sigset_t before;
    guard_enter(&before);
    e->next = engines;
    engines = e;
    if (!registered)
        registered = !pthread_atfork(before_fork, in_parent, in_child);
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

/* ------------------------------------------------------------- windows */

static char *window_of(struct engine *e, uint32_t space)
{
    char *have = __atomic_load_n(&e->window[space], __ATOMIC_ACQUIRE);
    if (have)
        return have;
    size_t size = LOCKS + MAX_PAGES * 8;
    char *mine = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, e->runtime_fd,
                      (off_t)(e->windows + space * WINDOW));
    if (mine == MAP_FAILED)
        return NULL;
    if (!__atomic_compare_exchange_n(&e->window[space], &have, mine, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        munmap(mine, size);
        return have;
    }
    return mine;
}

uint64_t *entries_of(struct engine *e, uint32_t space)
{
    char *window = window_of(e, space);
    return window ? (uint64_t *)(window + LOCKS) : NULL;
}

uint64_t *locks_of(struct engine *e, uint32_t space)
{
    return (uint64_t *)window_of(e, space);
}

/* ------------------------------------------------------------- mapping */

static void count_maps(void)
{
    char buffer[1024]; /* small: an alternate signal stack may be */
    uint64_t lines = 0;
    ssize_t got;
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        while ((got = read(fd, buffer, sizeof buffer)) > 0)
            for (ssize_t i = 0; i < got; i++)
                lines += buffer[i] == '\n';
        close(fd);
    }
    if (!maps_limit) {
        uint64_t limit = 65530;
        fd = open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);
        if (fd >= 0) {
            got = read(fd, buffer, sizeof buffer - 1);
            if (got > 0) {
                limit = 0;
                for (ssize_t i = 0; i < got && buffer[i] >= '0' && buffer[i] <= '9'; i++)
                    limit = limit * 10 + (uint64_t)(buffer[i] - '0');
            }
            close(fd);
        }
        maps_limit = limit / 4 * 3; /* the rest is for the program's own: its allocator needs mappings, too */
        if (maps_evicted && lines > maps_limit) /* they are all the program's: we share what is left with it */
            maps_limit = lines < limit ? lines + (limit - lines) / 2 : limit;
        maps_evicted = 0;
    }
    maps = maps_counted = lines;
}

/* The VMA budget: 0 while there is plenty, 1 when faults should copy more at once, 2 when this process has too many. */
int too_many_maps(void)
{
    /* The estimate knows of no merging and no unmapping: counted anew each time that it has grown a good deal. */
    if (!maps_limit || (maps > maps_limit / 2 && maps > maps_counted + maps_limit / 16))
        count_maps();
    return maps > maps_limit ? 2 : maps > maps_limit / 2;
}

/*
 * A private page is mapped writable (`stores`) only by who holds its block, with everybody's answers: a peer that could store as soon
 * as it is told would do so before others are, and they would still show the old bytes (S3). Its first store there faults instead,
 * and waits for the block.
 */
static int map_pages(struct region *r, uint64_t page, uint64_t pages, uint64_t word, int stores)
{
    char *at = r->address + page * PAGE;
    void *got;
    maps += 2;
    if (word & BEYOND)
        got = mmap(at, pages * PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, r->engine->end_fd, 0);
    else if (!(word & PFN_MASK))
        got = mmap(at, pages * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    else {
        int writable = stores && r->writable && word & PRIVATE;
        got = mmap(at, pages * PAGE, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED | MAP_FIXED, r->engine->pool_fd,
                   (off_t)((word & PFN_MASK) * PAGE));
        /* Stores are about to come: one look maps all that lies in its 64 KiB (measured: half the price of MAP_POPULATE). */
        for (char *look = at, *end = at + pages * PAGE; writable && got != MAP_FAILED && pages <= BLOCK && look < end;
             look += 16 * PAGE - (uintptr_t)look % (16 * PAGE))
            (void)*(volatile char *)look;
    }
    return got == MAP_FAILED ? errno : 0;
}

/* Let go of all translations of a region: every touch faults and maps what is around it (map_around). */
void evict(struct region *r)
{
    mmap(r->address, r->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    r->evicted = 1;
    maps_limit = 0; /* counted anew at the next look */
    maps_evicted = 1;
}

static int continues(struct region *r, uint64_t word, uint64_t next, uint64_t by)
{
    if ((word ^ next) & BEYOND || (r->writable && (word ^ next) & PRIVATE))
        return 0;
    uint64_t pfn = word & PFN_MASK;
    return (next & PFN_MASK) == (pfn && !(word & BEYOND) ? pfn + by : pfn);
}

static int map_entries(struct region *r, const uint64_t *entries, uint64_t low, uint64_t high, int stores)
{
    if (high > r->pages)
        high = r->pages;
    while (low < high) {
        uint64_t word = __atomic_load_n(&entries[low], __ATOMIC_ACQUIRE), end = low + 1;
        while (end < high && continues(r, word, __atomic_load_n(&entries[end], __ATOMIC_ACQUIRE), end - low))
            end++;
        int failed = map_pages(r, low, end - low, word, stores);
        if (failed) { /* ENOMEM: too many mappings; this one now, the others when they are touched */
            evict(r);
            return map_pages(r, low, end - low, word, stores);
        }
        low = end;
    }
    return 0;
}

int map_around(struct region *r, uint64_t page)
{
    const uint64_t *entries = entries_of(r->engine, r->space);
    if (!entries || page >= r->engine->spaces[r->space].pages)
        return ENOMEM;
    uint64_t low = page, first = page / BLOCK * BLOCK, high = page + 1, end = first + BLOCK;
    if (end > r->pages)
        end = r->pages;
    uint64_t word = __atomic_load_n(&entries[page], __ATOMIC_ACQUIRE);
    while (high < end && continues(r, word, __atomic_load_n(&entries[high], __ATOMIC_ACQUIRE), high - page))
        high++;
    for (uint64_t before; low > first; low--, word = before) {
        before = __atomic_load_n(&entries[low - 1], __ATOMIC_ACQUIRE);
        if (!continues(r, before, word, 1))
            break;
    }
    if (too_many_maps() == 2)
        evict(r);
    return map_pages(r, low, high - low, word, 0);
}

int map_region(struct region *r, uint64_t low, uint64_t high)
{
    const uint64_t *entries = entries_of(r->engine, r->space);
    int failed = entries ? 0 : ENOMEM;
    while (low < high && !failed) { /* piece by piece: the guard keeps this process's faults waiting */
        uint64_t end = low + 8 * BLOCK < high ? low + 8 * BLOCK : high;
        sigset_t before;
        guard_enter(&before);
        int crowded = too_many_maps() == 2;
        if (crowded)
            evict(r); /* all that is left to do is done when pages are touched */
        else
            failed = map_entries(r, entries, low, end, 0);
        guard_leave(&before);
        low = crowded ? high : end;
    }
    return failed;
}

int refresh(struct engine *e, uint32_t space, uint64_t low, uint64_t high, int stores)
{
    const uint64_t *entries = entries_of(e, space);
    int failed = entries ? 0 : ENOMEM;
    guard_lock();
    struct region *first = e->chain[space];
    for (struct region *r = first; r && first->next && stores && !failed; r = r->next) /* no region may lag behind another's stores */
        failed = map_entries(r, entries, low, high, 0);
    for (struct region *r = first; r && !failed; r = r->next)
        failed = map_entries(r, entries, low, high, stores);
    guard_unlock();
    return failed;
}

int protect(struct engine *e, uint32_t space, uint64_t low, uint64_t high)
{
    guard_lock();
    for (struct region *r = e->chain[space]; r; r = r->next) {
        uint64_t end = high < r->pages ? high : r->pages;
        /* What an eviction has unmapped must stay so: protecting it would show zeros. */
        if (r->writable && low < end && (r->evicted || mprotect(r->address + low * PAGE, (end - low) * PAGE, PROT_READ)))
            evict(r);
    }
    guard_unlock();
    return 0;
}

/* A space without entries: the published transaction's log says where its pages are now. */
int apply_log(struct engine *e, uint32_t space)
{
    int failed = 0;
    guard_lock();
    for (struct region *r = e->chain[space]; r; r = r->next)
        for (uint64_t i = 0, count = log_is_published(e) ? log_runs(e) : 0; i < count && !failed; i++) {
            const struct run *run = &e->log[i];
            if ((uint32_t)run->space == space && !(run->space & ZERO) && run->page < r->pages) {
                uint64_t end = run->page + run->pages < r->pages ? run->page + run->pages : r->pages;
                failed = map_pages(r, run->page, end - run->page, run->word, 0);
                if (failed)
                    evict(r); /* better no page than an old one */
            }
        }
    guard_unlock();
    return failed;
}

/* ------------------------------------------------------------- regions */

static size_t region_place(const char *address)
{
    size_t low = 0, high = region_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (regions[middle]->address <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

struct region *region_at(const char *address)
{
    size_t place = region_place(address);
    if (!place)
        return NULL;
    struct region *r = regions[place - 1];
    return address < r->address + r->pages * PAGE ? r : NULL;
}

void region_add(struct region *r)
{
    sigset_t before;
    guard_enter(&before);
    if (region_count == region_room) {
        size_t room = region_room ? 2 * region_room : 64;
        struct region **more = realloc(regions, room * sizeof *more);
        if (!more)
            abort();
        regions = more;
        region_room = room;
    }
    size_t place = region_place(r->address);
    memmove(regions + place + 1, regions + place, (region_count - place) * sizeof *regions);
    regions[place] = r;
    region_count++;
    r->next = r->engine->chain[r->space];
    __atomic_store_n(&r->engine->chain[r->space], r, __ATOMIC_RELAXED);
    guard_leave(&before);
}

void region_remove(struct region *r)
{
    sigset_t before;
    guard_enter(&before);
    size_t place = region_place(r->address) - 1;
    memmove(regions + place, regions + place + 1, (region_count - place - 1) * sizeof *regions);
    region_count--;
    for (struct region **at = &r->engine->chain[r->space]; *at; at = &(*at)->next)
        if (*at == r) {
            __atomic_store_n(at, r->next, __ATOMIC_RELAXED);
            break;
        }
    guard_leave(&before);
}

/* ------------------------------------------------------------ messages */

static void note_time(struct engine *e, uint64_t nanoseconds)
{
    uint64_t quarter = nanoseconds / 250;
    unsigned place = 0;
    if (quarter >= 4) {
        unsigned doubling = 63 - (unsigned)__builtin_clzll(quarter); /* quarter in [2^d, 2^(d+1)) */
        place = (doubling - 2) * 4 + (unsigned)((quarter >> (doubling - 2)) & 3);
    }
    if (place > 55)
        place = 55;
    __atomic_fetch_add(&e->counters->times[place], 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&e->counters->shootdowns, 1, __ATOMIC_RELAXED);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void complain(uint32_t slot)
{
    static const char start[] = "onecopy: a store waits for a process that does not answer, slot ";
    char line[128];
    size_t size = sizeof start - 1;
    memcpy(line, start, size);
    if (slot >= 100)
        line[size++] = (char)('0' + slot / 100);
    if (slot >= 10)
        line[size++] = (char)('0' + slot / 10 % 10);
    line[size++] = (char)('0' + slot % 10);
    static const char end[] = " of the pool; is it stopped? 'onecopy info' names it\n";
    memcpy(line + size, end, sizeof end - 1);
    if (write(2, line, size + sizeof end - 1) < 0) {
        /* nowhere to complain to */
    }
}

static void ring(struct engine *e, uint32_t record, uint32_t slot)
{
    struct bell *bell = &e->bells[slot];
    __atomic_fetch_or(&bell->bits[record / 64], 1ull << record % 64, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&bell->futex, 1, __ATOMIC_SEQ_CST);
    futex_wake(&bell->futex);
}

/*
 * Return how many have not answered, one of them in *left. A look skips the dead, and who maps the space no more: a dead one's
 * slot may be somebody else's by now. It rings again for the others: a slot's new holder has never heard the bell.
 */
static int waiting(struct engine *e, uint32_t record, int look, uint32_t *left)
{
    struct record *m = &e->records[record];
    const uint64_t *mappers = e->spaces[m->space].mappers;
    int count = 0;
    for (uint32_t w = 0; w < SLOTS / 32; w++)
        for (uint32_t bits = (uint32_t)__atomic_load_n(&m->acks[w], __ATOMIC_ACQUIRE); bits; bits &= bits - 1) {
            uint32_t slot = w * 32 + (uint32_t)__builtin_ctz(bits);
            if (look && (!slot_alive(e, slot) || !(__atomic_load_n(&mappers[slot / 64], __ATOMIC_SEQ_CST) >> slot % 64 & 1))) {
                __atomic_fetch_and(&m->acks[w], ~(1ull << slot % 32), __ATOMIC_SEQ_CST);
                continue;
            }
            if (look)
                ring(e, record, slot);
            *left = slot;
            count++;
        }
    return count;
}

int shoot(struct engine *e, uint32_t record, uint32_t space, int kind, uint64_t low, uint64_t high, long patience, uint32_t *stuck)
{
    struct record *m = &e->records[record];
    uint64_t any = 0;
    m->kind = (uint32_t)kind;
    m->space = space;
    m->low = low;
    m->high = high;
    m->number++;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the entries before the mappers */
    for (uint32_t w = 0; w < SLOTS / 32; w++) {
        uint64_t mappers = __atomic_load_n(&e->spaces[space].mappers[w / 2], __ATOMIC_SEQ_CST);
        uint32_t targets = (uint32_t)(w % 2 ? mappers >> 32 : mappers);
        if (w == e->slot / 32)
            targets &= ~(1u << e->slot % 32);
        __atomic_store_n(&m->acks[w], (uint64_t)m->number << 32 | targets, __ATOMIC_SEQ_CST); /* the message stands before this */
        any |= targets;
    }
    if (!any)
        return 0;
    uint64_t start = now();
    for (uint32_t w = 0; w < SLOTS / 32; w++)
        for (uint32_t bits = (uint32_t)__atomic_load_n(&m->acks[w], __ATOMIC_RELAXED); bits; bits &= bits - 1)
            ring(e, record, w * 32 + (uint32_t)__builtin_ctz(bits));
    uint32_t slot = 0;
    int said = 0, spins = 200;
    for (;;) {
        uint32_t seen = __atomic_load_n(&m->futex, __ATOMIC_SEQ_CST);
        if (!waiting(e, record, 0, &slot))
            break;
        if (spins-- > 0) {
            for (int i = 0; i < 20; i++)
                __asm__ volatile("" ::: "memory");
            continue;
        }
        if (futex_wait(&m->futex, seen, 20) != ETIMEDOUT)
            continue;
        if (!waiting(e, record, 1, &slot))
            break;
        uint64_t waited = (now() - start) / 1000000;
        if (patience && waited > (uint64_t)patience) {
            for (uint32_t w = 0; w < SLOTS / 32; w++)
                __atomic_store_n(&m->acks[w], 0, __ATOMIC_SEQ_CST);
            *stuck = slot;
            return ETIMEDOUT;
        }
        if (waited > 10000 && !said++)
            complain(slot);
    }
    note_time(e, now() - start);
    return 0;
}

static void answer(struct engine *e, uint32_t record)
{
    struct record *m = &e->records[record];
    uint64_t mine = 1ull << e->slot % 32, *acks = &m->acks[e->slot / 32], seen = __atomic_load_n(acks, __ATOMIC_SEQ_CST);
    /* A bell may be older than the message: only who is waited for may read it, and it stands complete then. */
    if (!(seen & mine))
        return;
    uint32_t space = (uint32_t)m->space;
    if (space < SPACES && __atomic_load_n(&e->chain[space], __ATOMIC_RELAXED)) {
        if (m->kind == PROTECT)
            protect(e, space, m->low, m->high);
        else if (m->kind == LOG)
            apply_log(e, space);
        else
            refresh(e, space, m->low, m->high, 0);
    }
    /* The answer is to the message that was read: its sender may have given us up, and sent another one meanwhile. */
    uint64_t have = seen;
    while (have >> 32 == seen >> 32 && have & mine)
        if (__atomic_compare_exchange_n(acks, &have, have & ~mine, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            break;
    for (uint32_t w = 0; w < SLOTS / 32; w++)
        if ((uint32_t)__atomic_load_n(&m->acks[w], __ATOMIC_SEQ_CST))
            return; /* the last one to answer wakes who waits */
    __atomic_fetch_add(&m->futex, 1, __ATOMIC_SEQ_CST);
    futex_wake(&m->futex);
}

static void *serve(void *argument)
{
    struct engine *e = argument;
    struct bell *bell = &e->bells[e->slot];
    for (;;) {
        uint32_t seen = __atomic_load_n(&bell->futex, __ATOMIC_SEQ_CST); /* before all looks: what comes after one wakes us */
        if (__atomic_load_n(&e->stopping, __ATOMIC_SEQ_CST))
            break;
        int any = 0;
        for (uint32_t w = 0; w < SLOTS * RECORDS / 64; w++)
            if (__atomic_load_n(&bell->bits[w], __ATOMIC_SEQ_CST))
                for (uint64_t bits = __atomic_exchange_n(&bell->bits[w], 0, __ATOMIC_SEQ_CST); bits; bits &= bits - 1) {
                    answer(e, w * 64 + (uint32_t)__builtin_ctzll(bits));
                    any = 1;
                }
        if (!any)
            futex_wait(&bell->futex, seen, 0);
    }
    return NULL;
}

int service_start(struct engine *e)
{
    sigset_t before;
    e->stopping = 0;
    block_signals(&before); /* the thread inherits the mask: it gets no signal */
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 256 << 10);
    int failed = pthread_create(&e->service, &attributes, serve, e);
    pthread_attr_destroy(&attributes);
    restore_signals(&before);
    e->alive = !failed;
    return failed;
}

void service_stop(struct engine *e)
{
    if (!e->alive)
        return;
    struct bell *bell = &e->bells[e->slot];
    __atomic_store_n(&e->stopping, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&bell->futex, 1, __ATOMIC_SEQ_CST);
    futex_wake(&bell->futex);
    pthread_join(e->service, NULL);
    e->alive = 0;
}
