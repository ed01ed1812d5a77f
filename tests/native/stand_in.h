/*
 * For driver.c: a run-time file and a pool in memory, and what Python does with them - slots, transactions, sweeping - by hand.
 */
#define _GNU_SOURCE
#include "../../daxemu/_fault.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGES = 1100, FRAMES = 24576, PROCESSES = 36, WORKERS = 3, THREADS = 2, CLONES = 8, LOG_ROOM = 4096 };
#define LOCK_BASE (1ll << 40)
#define LANES (PROCESSES * THREADS)

struct base { /* the run-time file up to the windows */
    uint64_t live, free, floor, log_count, log_generation, log_owner, spaces_used, limbo;
    uint64_t incarnations[SLOTS * 8];
    struct counters counters;
    struct space spaces[2];
    struct record records[SLOTS * RECORDS];
    struct bell bells[SLOTS];
    struct run log[LOG_ROOM];
    uint8_t table[FRAMES];
};
struct control {
    uint64_t stop, failed, taken[PROCESSES], restarts, clones_made, moves, conflicts, forks, redone, turn;
    uint64_t begun[LANES][PAGES], done[LANES][PAGES];
    struct { uint64_t pfn[PAGES], sum[PAGES]; } clone[CLONES];
};

static struct base *base;
static struct control *control;
static char *pool;
static int runtime_fd, pool_fd, lock_fd, lock_own = -1, slot_fd = -1, kills, forks, reuse;
static uint64_t windows;
static struct engine engine;
static struct region regions[THREADS + 1]; /* one a thread to store through, one to read through */
static __thread uint64_t state;
static int die_at = -1, die_after;

static void fail(const char *what, uint64_t a, uint64_t b, uint64_t c)
{
    dprintf(2, "FAILED: %s (%llu, %llu, %llu)\n", what, (unsigned long long)a, (unsigned long long)b, (unsigned long long)c);
    __atomic_store_n(&control->failed, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&control->stop, 1, __ATOMIC_SEQ_CST);
    abort();
}
#define CHECK(what, ok, a, b, c) do { if (!(ok)) fail(what, a, b, c); } while (0)
#define MUST(call) CHECK(#call, (call) >= 0, (uint64_t)errno, 0, 0)

static uint64_t number(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % below;
}

static int reopen(int fd)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, O_RDWR | O_CLOEXEC);
}

static void die(int step)
{
    if (step == die_at && __atomic_sub_fetch(&die_after, 1, __ATOMIC_SEQ_CST) == 0)
        kill(getpid(), SIGKILL);
}

static uint64_t sum_of(uint64_t pfn)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < PAGE / 8; i++)
        sum = sum * 31 + __atomic_load_n((uint64_t *)(pool + pfn * PAGE) + i, __ATOMIC_RELAXED);
    return sum;
}

static uint64_t entry(uint64_t page)
{
    return __atomic_load_n(&entries_of(&engine, 0)[page], __ATOMIC_SEQ_CST);
}

/* ------------------------------------------------- what Python does */

static int lock_range(int fd, int command, uint32_t slot)
{
    struct flock range = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = LOCK_BASE + slot, .l_len = 1};
    return fcntl(fd, command, &range) ? -1 : range.l_type;
}

static void map_for(uint32_t slot, int on)
{
    uint64_t bit = 1ull << slot % 64, *word = &base->spaces[0].mappers[slot / 64];
    if (on)
        __atomic_fetch_or(word, bit, __ATOMIC_SEQ_CST);
    else
        __atomic_fetch_and(word, ~bit, __ATOMIC_SEQ_CST);
}

/* Frames that faults have taken and nothing names: Spaces.strays, and what limbo held. */
static void sweep(void)
{
    static __thread uint8_t held[FRAMES];
    memset(held, 0, sizeof held);
    for (uint64_t f = 1; f < FRAMES; f++)
        held[f] = (__atomic_load_n(&base->table[f], __ATOMIC_SEQ_CST) & (uint8_t)~BACKED) != 0;
    for (uint32_t r = 0; r < (PROCESSES + 1) * RECORDS; r++) {
        uint64_t count = __atomic_load_n(&base->records[r].count, __ATOMIC_SEQ_CST);
        if (count == UINT64_MAX)
            return;
        for (uint64_t i = 0; i < count; i++)
            held[__atomic_load_n(&base->records[r].claimed, __ATOMIC_SEQ_CST) + i] = 0;
    }
    for (uint64_t p = 0; p < PAGES; p++)
        held[entry(p) & PFN_MASK] = 0;
    for (int c = 0; c < CLONES; c++)
        for (uint64_t p = 0; p < PAGES; p++)
            held[control->clone[c].pfn[p]] = 0;
    await_faults(&engine, 0);
    for (uint64_t f = 1; f < FRAMES; f++)
        if (held[f]) {
            if (__atomic_load_n(&base->table[f], __ATOMIC_SEQ_CST) & BACKED)
                __atomic_fetch_sub(&base->counters.held, 1, __ATOMIC_SEQ_CST);
            memset(pool + f * PAGE, 0xee, PAGE); /* whoever still sees it will notice */
            __atomic_store_n(&base->table[f], BACKED, __ATOMIC_SEQ_CST);
        }
}

static void begin(void)
{
    CHECK("flock", !flock(lock_own, LOCK_EX), (uint64_t)errno, 0, 0);
    if (base->log_count) {
        base->log_generation <= base->live ? control->redone++ : 0;
        redo(&engine);
    }
    for (uint32_t s = 0; s < PROCESSES; s++)
        if (control->taken[s] == 1 && s != engine.slot && lock_range(engine.runtime_fd, F_OFD_GETLK, s) == F_UNLCK) {
            bury(&engine, s);
            control->taken[s] = reuse ? 0 : 2;
        }
}

static void finish(void)
{
    CHECK("unlock", !flock(lock_own, LOCK_UN), (uint64_t)errno, 0, 0);
}

static void become(uint32_t slot)
{
    engine.slot = slot;
    engine.incarnation = base->incarnations[slot * 8];
}

/* Take a free slot; the lock is held. -1: none. */
static int claim_slot(int *fd)
{
    *fd = reopen(runtime_fd);
    for (uint32_t s = 0; s < PROCESSES; s++)
        if (!control->taken[s] && lock_range(*fd, F_OFD_SETLK, s) >= 0) {
            control->taken[s] = 1;
            __atomic_add_fetch(&base->incarnations[s * 8], 1, __ATOMIC_SEQ_CST);
            return (int)s;
        }
    close(*fd);
    return -1;
}

static uint64_t new_frame(void)
{
    for (uint64_t f = FRAMES - 1; f; f--)
        if (claim(&engine, f, 1, USED))
            return f;
    fail("no frame", 0, 0, 0);
    return 0;
}

/* Freeze; make what is dirty extents; share it with a clone, or move a page to a frame of the same content. */
static void change(void)
{
    static uint64_t words[PAGES], sums[PAGES];
    uint32_t stuck;
    begin();
    uint64_t low = number(2) ? 0 : number(PAGES), high = low ? low + 1 + number(PAGES - low) : PAGES, count = 0;
    uint64_t moved = number(3) == 0 ? low + number(high - low) : PAGES;
    int slot = (int)number(CLONES);
    CHECK("freeze", !freeze(&engine, 0, low, high, words, 60000, &stuck), stuck, 0, 0);
    if (moved == PAGES)
        memset(&control->clone[slot], 0, sizeof control->clone[slot]);
    for (uint64_t p = low; p < high; p++) {
        uint64_t word = words[p - low];
        CHECK("S2: a frozen page is private", !(word & (PRIVATE | FREEZING)), p, word, 0);
        sums[p] = moved == PAGES ? sum_of(word & PFN_MASK) : 0;
        struct run run = {FOLD, p, 1, word & PFN_MASK};
        if (p == moved) {
            run = (struct run){KEEP, p, 1, new_frame()};
            MUST(pwrite(pool_fd, pool + (word & PFN_MASK) * PAGE, PAGE, (off_t)(run.word * PAGE)));
        }
        if (p == moved || word & DIRTY)
            base->log[count++] = run;
    }
    base->log_generation = base->live + 1;
    __atomic_store_n(&base->log_count, count, __ATOMIC_SEQ_CST);
    int64_t result = commit(&engine, base->live + 1);
    CHECK("commit", result >= -1 && (moved < PAGES || result < 0), (uint64_t)result, 0, 0);
    if (result >= 0)
        control->conflicts++;
    else if (moved < PAGES)
        control->moves++;
    for (uint64_t p = low; p < high && moved == PAGES; p++) {
        control->clone[slot].sum[p] = sums[p];
        control->clone[slot].pfn[p] = words[p - low] & PFN_MASK;
    }
    control->clones_made += moved == PAGES;
    if (number(4) == 0)
        sweep();
    finish();
}

static void check_clones(void)
{
    for (int c = 0; c < CLONES; c++)
        for (uint64_t p = 0; p < PAGES; p++) {
            uint64_t pfn = control->clone[c].pfn[p];
            if (pfn)
                CHECK("S4: a clone's page changed", sum_of(pfn) == control->clone[c].sum[p], (uint64_t)c, p, pfn);
        }
}

/* ----------------------------------------------------------- processes */

static uint64_t *word_of(const struct region *r, uint64_t page, uint64_t lane)
{
    return (uint64_t *)(r->address + page * PAGE) + lane * 7;
}

/* To ThreadSanitizer each remapping by the service thread writes the page, and the hardware's order means nothing: not looked at there. */
__attribute__((no_sanitize("thread"))) static uint64_t word_in(const volatile uint64_t *word)
{
    return *word;
}

__attribute__((no_sanitize("thread"))) static void put_word(volatile uint64_t *word, uint64_t value)
{
    *word = value;
}

/* What all processes have in common; the caller forks them. */
static void set_up(void)
{
    windows = (sizeof(struct base) + PAGE - 1) / PAGE * PAGE;
    control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    runtime_fd = memfd_create("run-time", MFD_CLOEXEC);
    pool_fd = memfd_create("pool", MFD_CLOEXEC);
    lock_fd = memfd_create("lock", MFD_CLOEXEC);
    if (control == MAP_FAILED)
        abort();
    if (ftruncate(runtime_fd, (off_t)(windows + 2 * WINDOW)) || ftruncate(pool_fd, FRAMES * PAGE))
        fail("set-up", (uint64_t)errno, 0, 0);
    base = mmap(NULL, windows, PROT_READ | PROT_WRITE, MAP_SHARED, runtime_fd, 0);
    pool = mmap(NULL, FRAMES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, pool_fd, 0);
    if (base == MAP_FAILED || pool == MAP_FAILED)
        fail("mmap", (uint64_t)errno, 0, 0);
    *base = (struct base){.live = 1, .free = 4 * FRAMES, .floor = FRAMES, .log_generation = UINT64_MAX, .spaces_used = 1};
    base->spaces[0].pages = base->spaces[0].length = PAGES;
    base->table[0] = USED;
    uint64_t *entries = mmap(NULL, LOCKS + PAGES * 8, PROT_READ | PROT_WRITE, MAP_SHARED, runtime_fd, (off_t)windows);
    for (uint64_t p = 0; p < PAGES; p++) /* data that others share, and holes */
        if (p % 100 < 90)
            entries[LOCKS / 8 + p] = 1 + p, base->table[1 + p] = USED;
}

static void start_engine(uint32_t slot)
{
    engine = (struct engine){
        .base = (char *)base, .pool = pool, .table = base->table, .spaces = base->spaces, .records = base->records,
        .bells = base->bells, .counters = &base->counters, .log = base->log, .live = &base->live, .free = &base->free,
        .floor = &base->floor, .log_count = &base->log_count, .log_generation = &base->log_generation,
        .log_owner = &base->log_owner, .spaces_used = &base->spaces_used, .windows = windows, .frames = FRAMES,
        .runtime_fd = runtime_fd, .pool_fd = pool_fd, .end_fd = memfd_create("end", 0),
        .incarnations = base->incarnations, .child_slot = -1, .child_fds = {-1, -1},
        .window = calloc(SPACES, sizeof(char *)), .chain = calloc(SPACES, sizeof(struct region *)),
    };
    become(slot);
    engines_add(&engine);
}

static void leave(void)
{
    begin();
    for (int i = 0; i <= THREADS; i++)
        region_remove(&regions[i]);
    map_for(engine.slot, 0);
    finish();
    service_stop(&engine);
}

static void map_all(void)
{
    for (int i = 0; i <= THREADS; i++) {
        char *address = mmap(NULL, PAGES * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        CHECK("mmap", address != MAP_FAILED, (uint64_t)errno, 0, 0);
        regions[i] = (struct region){.engine = &engine, .address = address, .pages = PAGES, .writable = i < THREADS,
                                     .granule = i ? 16 : 1, .fixed = i == 0, .streak = UINT64_MAX};
        region_add(&regions[i]);
        CHECK("map_region", !map_region(&regions[i], 0, PAGES), (uint64_t)errno, 0, 0);
    }
}

/* The slot is ours: from here on we are one of those who store, and answer. */
static void join(uint32_t slot)
{
    become(slot);
    CHECK("service_start", !service_start(&engine), 0, 0, 0);
    CHECK("handler_install", !handler_install(SIGSEGV), 0, 0, 0);
    begin();
    map_for(engine.slot, 1);
    map_all();
    finish();
}

/* In a forked child, for which the parent has made the slot, as Mount.become_child. */
static void be_child(uint32_t slot)
{
    close(slot_fd);
    close(lock_own);
    lock_own = reopen(lock_fd);
    fault_step = NULL;
    CHECK("adopt", !adopt(&engine, slot), 0, 0, 0);
}
